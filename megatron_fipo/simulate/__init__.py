"""A simulation of a training run before it is paid for: the driver's own collector and dispatch over engines and ranks that
take the planner's times. A clock is advanced from event to event; nothing sleeps and nothing is computed."""
