"""A pytest plugin: hypothesis does not take the emulator's slowness for a fault of the tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("emulated", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("emulated")
