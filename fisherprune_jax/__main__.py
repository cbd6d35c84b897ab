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
      write(page, lambda: report_of(args.file))
      print(page)
    sys.stdout.flush()
  except BrokenPipeError:  # the reader stopped early, like ``head``
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except (ValueError, OSError, ImportError) as error:
    print(f"{parser.prog}: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
