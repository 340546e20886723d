"""`make audit`: asks pip-audit whether a package of requirements-dev.lock has a known vulnerability.

A finding is a failure. What could not be asked, for want of the network, of pip-audit or of an index that answers, is
said and is none.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

LOCK = "requirements-dev.lock"
ASK = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "-r", LOCK, "--progress-spinner", "off"]


def judged(status: int, out: str, err: str) -> tuple[int, str]:
    """Exit status and words for an answer of pip-audit in JSON; its own status does not tell findings from errors."""
    try:
        packages = json.loads(out)["dependencies"]
    except (ValueError, LookupError, TypeError):
        last = (err.strip().splitlines() or [f"exit status {status}"])[-1]
        return 0, f"audit: left out, pip-audit gave no answer ({last})"
    found = [
        f"audit: {package['name']} {package['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions'])}"
        for package in packages
        for hole in package.get("vulns", ())
    ]
    skipped = sum("skip_reason" in package for package in packages)
    words = f"audit: {len(found)} known vulnerabilities in {len(packages) - skipped} packages"
    if skipped:
        words += f"; of {skipped} others the index knows nothing (an index that only serves files?)"
    return int(bool(found)), "\n".join([*found, words])


def main(ask: Sequence[str] = ASK) -> int:
    """Asks, prints what came of it, and returns the exit status."""
    status, words = 0, ""
    if find_spec("pip_audit") is None:
        words = f"audit: left out, pip-audit is not installed ({sys.executable} -m pip install pip-audit)"
    else:
        try:
            socket.create_connection(("pypi.org", 443), 5).close()
        except OSError:
            words = "audit: left out, the network does not reach pypi.org, where pip-audit asks"
        else:
            done = subprocess.run([*ask, "-f", "json"], capture_output=True, text=True)
            status, words = judged(done.returncode, done.stdout, done.stderr)
    print(words)
    return status


if __name__ == "__main__":
    sys.exit(main())
