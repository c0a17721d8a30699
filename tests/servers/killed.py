"""A training run with a payload, in a process of its own, which a test kills."""

import sys
from pathlib import Path

import ckpt_callbacks as cc
from servers.backends import Backend
from servers.training import train

if __name__ == "__main__":
    directory, uri, name = sys.argv[1:]
    there = Backend(uri, lambda location: {})
    train(Path(directory), there.tracker(name, payload=cc.Safetensors("w")), drain_limit=60.0)
