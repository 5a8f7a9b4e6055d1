"""Making a model smaller: methods turn statistics into an `ExpertPlan`, `convert` applies it."""
