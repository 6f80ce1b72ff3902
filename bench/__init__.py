"""Measurements that no test decides on: us beside a peer, in the same run, on this machine."""
