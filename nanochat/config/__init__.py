"""Every knob: one frozen dataclass and one file per stage. Imports neither torch nor ray."""
