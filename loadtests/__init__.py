"""Load tests: scripts that talk to a live server by HTTP and write their figures as JSON and a picture."""
