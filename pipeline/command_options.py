"""The options that several commands take, worded once."""

from pathlib import Path

import click

overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one config key (YAML)."
)
store = click.option(
    "--store",
    type=click.Path(path_type=Path),
    default=Path("store"),
    show_default=True,
    envvar="REGROW_STORE",
    help="Where results are cached.",
)
runs = click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where run folders go."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
