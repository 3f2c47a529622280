"""`python -m longmem.bench QUESTION ...` is `longmem bench QUESTION ...`, without importing the models' libraries."""

import typer

from .cli import bench_app

if __name__ == "__main__":
    try:
        bench_app(prog_name="python -m longmem.bench")
    except (ValueError, OSError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from None
