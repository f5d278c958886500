"""One report from one machine with a GPU: `make gpu-kit` where there is a network, then `make gpu-report` there."""
