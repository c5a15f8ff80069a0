"""Completion of commands and options in bash and zsh."""

from __future__ import annotations

import re
from collections.abc import Mapping

SCRIPT = """\
[ -n "$ZSH_VERSION" ] && autoload -U +X bashcompinit && bashcompinit
_tuneavideo() {
  local words='COMMANDS' current=${COMP_WORDS[COMP_CWORD]}
  [ "$COMP_CWORD" -gt 1 ] && case ${COMP_WORDS[1]} in
CASES
  esac
  COMPREPLY=()
  case $COMP_CWORD,$current in
    1,* | *,-*) COMPREPLY=($(compgen -W "$words" -- "$current")) ;;
  esac
}
complete -o default -F _tuneavideo tuneavideo
"""


def completion_script(helps: Mapping[str, str]) -> str:
    """Return a script that completes the commands and the options in their help."""
    cases = []
    for name, text in helps.items():
        options = sorted({*re.findall(r"--[a-z][a-z0-9-]+", text)})
        cases.append(f"  {name}) words='{' '.join(options)}' ;;")
    return SCRIPT.replace("COMMANDS", " ".join(helps)).replace("CASES", "\n".join(cases))
