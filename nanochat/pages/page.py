"""Values and a template to one self-contained HTML file: no network, no scripts, whatever is in the values.

Templates are the .html files of this package. Every value is escaped as it goes in (texts come from corpora and from
the model), and the page's own policy forbids scripts and connections should anything slip through.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

import nanochat
from nanochat import storage
from nanochat.pages.charts import short_number


def write_page(path: str, template: str, values: dict[str, Any]) -> str:
    """Fill a template of this package and write it to a path or URI, atomically; returns the path."""
    text = environment().get_template(template).render(values)
    with storage.atomic_write(path) as file:
        file.write(text.encode("utf-8", "replace"))  # a sample may hold half of a surrogate pair
    return path


def environment() -> jinja2.Environment:
    """Return the templates of this package with the filters that they use."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("nanochat", "pages"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters |= {"short": short_number, "bytes": size, "percent": percent, "duration": duration}
    return found


def source_of(code: Callable[..., Any]) -> str:
    """Return where a function or class stands in this installation, as `nanochat/data/packing.py:57`."""
    plain = inspect.unwrap(code)
    file = inspect.getsourcefile(plain)
    assert file is not None, "the package's source is there"
    root = Path(nanochat.__file__).parent.parent
    return f"{Path(file).relative_to(root).as_posix()}:{inspect.getsourcelines(plain)[1]}"


def size(num_bytes: float) -> str:
    """Return bytes as a person reads them, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Return seconds as seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
