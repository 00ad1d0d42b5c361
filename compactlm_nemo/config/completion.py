"""Completion of `python -m recipes.NAME` in bash and zsh, by Hydra's own query; Hydra completes `python FILE` alone."""

BASH = r"""_compactlm_complete() {
    local recipe=${COMP_WORDS[2]} word=${COMP_LINE##* }
    [[ ${COMP_WORDS[1]} == -m && $recipe == recipes.* && $COMP_CWORD -gt 2 ]] || return
    local line="recipe ${COMP_LINE#*"$recipe"}"
    COMPREPLY=($(compgen -o nospace -W "$(COMP_LINE=$line "${COMP_WORDS[0]}" -m "$recipe" -sc query=bash)" -- "$word"))
}
[[ -n $ZSH_VERSION ]] && autoload -Uz bashcompinit && bashcompinit
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _compactlm_complete python python3"""
"""What `eval` of a shell takes; words do not end at `=`."""
