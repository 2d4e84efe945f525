"""Rewards that a random model gets now and then; rollout actors import this file by its name."""

import os


def odd_length(conversation, reply):
    return float(len(reply) % 2)


def always_the_same(conversation, reply):
    return 1.0


def broken(conversation, reply):
    raise KeyError("no such fact")


def not_a_number(conversation, reply):
    return float("nan")


def deadly(conversation, reply):
    os.kill(os.getpid(), 9)
