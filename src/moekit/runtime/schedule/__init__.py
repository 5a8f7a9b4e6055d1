"""Where, in which order and with whom experts run: functions of routing and measured costs."""
