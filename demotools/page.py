"""HTML pages for people to look at: one file each, which loads nothing.

Texts are escaped, and the pages' content policy lets a browser load nothing but the pictures
inside the file.
"""

from __future__ import annotations

from typing import Any

import jinja2

from demotools.info import size_text


def rendered_page(template: str, package: str = "demotools", **values: object) -> str:
    """The HTML of a template that lies in `package` and extends `page.html`."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(name, ".") for name in dict.fromkeys((package, "demotools"))]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = environment.filters
    filters["size"] = size_text
    return environment.get_template(template).render(**values)
