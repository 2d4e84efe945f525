"""What Ray reads from the environment, set before it is imported: as the jobs set it."""

from nanochat.cluster.environment import set_ray_environment

set_ray_environment()
