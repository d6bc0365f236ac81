"""A backend with an online softmax, and a policy that reads the newest and the best pages."""
