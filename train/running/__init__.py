"""Running: processes, checkpoints, signals, logs, and which Trainer options a run takes."""
