"""Types of experts, one a module; each registers a bank of kind "expert"."""
