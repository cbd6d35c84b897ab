"""``python -m fisherprune_jax inspect FILE`` describes a saved network."""

import argparse
import os
import sys
from collections.abc import Sequence

from fisherprune_jax._compaction.inspecting import show
from fisherprune_jax._html.page import write
from fisherprune_jax._html.saved import report_of


def main(argv: Sequence[str] | None = None) -> int:
  """Run a command; returns the exit code."""
  parser = argparse.ArgumentParser(prog="python -m fisherprune_jax", description="Compact networks in files.")
  commands = parser.add_subparsers(dest="command", required=True)
  inspect = commands.add_parser("inspect", help="print what a saved network is")
  inspect.add_argument("file", metavar="FILE", help="what small.save wrote")
  inspect.add_argument(
    "--html", metavar="OUT", nargs="?", const="", help="write a page instead; without OUT, to FILE.html"
  )
  args = parser.parse_args(argv)
  try:
    if args.html is None:
      show(args.file)
    else:
      page = args.html or f"{args.file}.html"
      _check_apart(page, args.file)
      write(page, lambda: report_of(args.file))
      print(page)
    sys.stdout.flush()
  except BrokenPipeError:  # the reader stopped early, like ``head``
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except (ValueError, OSError, ImportError) as error:
    print(f"{parser.prog}: {error}", file=sys.stderr)
    return 1
  return 0


def _check_apart(page: str, file: str) -> None:
  """Raise if the page would replace the network."""
  if os.path.exists(page) and os.path.exists(file) and os.path.samefile(page, file):
    raise ValueError(
      f"A page needs another file than the network, got {page!r}, the network itself. Name one such as {file}.html."
    )


if __name__ == "__main__":
  sys.exit(main())
