"""How the driver fills an iteration: requests to engines, their replies, groups of responses, dynamic sampling."""
