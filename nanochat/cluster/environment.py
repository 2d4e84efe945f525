"""What Ray reads from the environment, set before Ray is imported (it reads some of it at import)."""

import os
from pathlib import Path

RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # a Ray of this user alone, also on a shared machine; the token is in ~/.ray/auth_token
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a lost worker is noticed after half a second, not two
    # a node that was just lost still counts for some seconds: then workers are counted anew
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_worker_niceness": "0",  # on few cores Ray's own idle processes come before workers of its default, 15
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning in workers
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a sweep's runs write their own metrics
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def set_ray_environment() -> None:
    """Set what the user has not set. Call it first thing in an entry point, before anything imports ray."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def compile_cache() -> str:
    """Return the folder where compiled kernels are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return os.path.join(root, "nanochat", "torchinductor")
