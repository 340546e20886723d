"""Watching a run: what each update looks like, and an alarm when a value leaves its usual range."""

from emerging_optimizers.watch.alarms import Alarm
from emerging_optimizers.watch.spike_watch import SpikeWatch

__all__ = ["Alarm", "SpikeWatch"]
