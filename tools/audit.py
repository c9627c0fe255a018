"""Known vulnerabilities of the pinned versions, by the `pip-audit` on PATH: `python tools/audit.py [FILE]`.

    exit 0   "audit: 130 packages, no known vulnerability"; or "audit: not run: ...": nobody could be asked
    exit 1   a vulnerability, or an audit that failed for any other reason than a network that is not there

pip-audit itself ends with 0 where the server knows none of the packages, and with 1 both where it found
something and where it reached nobody; so what it wrote is read, not how it ended.
"""

import json
import re
import subprocess
import sys
from typing import Any

COMMAND = ["pip-audit", "--no-deps", "--disable-pip", "--progress-spinner=off", "--desc=off", "--format=json"]
NO_NETWORK = re.compile(
    r"ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|Max retries exceeded|Could not connect"
    r"|Name or service not known|Temporary failure in name resolution"
)


def verdict(output: str, errors: str) -> tuple[int, list[str]]:
    """Exit code and lines to show, from what pip-audit wrote to stdout and stderr."""
    try:
        dependencies: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, LookupError, TypeError):
        said = (errors.strip().splitlines() or ["pip-audit said nothing"])[-1]
        if NO_NETWORK.search(errors):
            return 0, [f"audit: not run: the advisory server cannot be reached ({said[:150]})"]
        return 1, [f"audit: failed: {said}"]
    asked = [one for one in dependencies if "skip_reason" not in one]
    found = [
        f"{one['name']} {one['version']}: {each['id']}, fixed in: {', '.join(each['fix_versions']) or '-'}"
        for one in asked
        for each in one["vulns"]
    ]
    if found:
        return 1, [*found, f"audit: {len(found)} known vulnerabilities in {len(asked)} packages"]
    if not asked:
        return 0, [f"audit: not run: the server knows none of {len(dependencies)} packages"]
    left = [one["name"] for one in dependencies if "skip_reason" in one]
    lines = [f"audit: not known to the server: {', '.join(left)}"] if left else []
    return 0, [*lines, f"audit: {len(asked)} packages, no known vulnerability"]


def main(path: str) -> int:
    """Audit one file of pinned versions."""
    try:
        done = subprocess.run([*COMMAND, "--requirement", path], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        print("audit: not run: pip-audit is not installed")
        return 0
    code, lines = verdict(done.stdout, done.stderr)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["constraints.txt"])))
