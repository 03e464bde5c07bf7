"""What every measure tells about itself, and where it is written down."""

import os
import re
import subprocess

DOCS = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "docs")


def machine():
    with open("/proc/cpuinfo") as file:
        name = re.search(r"model name\s*:\s*(.*)", file.read())
    version = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    return f"{os.cpu_count()} processors ({name[1] if name else 'unknown'}), Linux {os.uname().release}, {version}"


def write_docs(name, text, picture=""):
    """Puts what was printed into its place in docs/benchmarks.md, and below it a picture, in Markdown."""
    path = os.path.join(DOCS, "benchmarks.md")
    with open(path) as file:
        page = file.read()
    begin, end = f"<!-- {name}: written by scripts/bench {name} --docs -->\n", f"<!-- end of {name} -->\n"
    if begin not in page:
        page += "\n" + begin + end
    head, rest = page.split(begin)
    with open(path, "w") as file:
        file.write(head + begin + "```\n" + text + "\n```\n" + (f"\n{picture}\n" if picture else "") + end + rest.split(end)[1])
