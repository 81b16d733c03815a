
# cargo xtask, in this workspace; all else is for what completed cargo before.
_iot_xtask() {
    if [[ $COMP_CWORD -ge 2 && ${COMP_WORDS[1]} == xtask && $PWD/ == @ROOT@/* ]]; then
        local -a words=(cargo-xtask "${COMP_WORDS[@]:2}")
        local -a COMP_WORDS=("${words[@]}")
        local COMP_CWORD=$((COMP_CWORD - 1))
        _clap_complete_cargo_xtask cargo-xtask "$2" "$3"
    elif [[ -n ${_iot_xtask_before-} ]]; then
        "$_iot_xtask_before" "$@"
    fi
}
if ! complete -p cargo &>/dev/null; then
    # bash-completion has its scripts loaded when they are first asked for: 2.12 by the one, older ones by the other.
    if declare -F _comp_load >/dev/null; then
        _comp_load cargo
    elif declare -F _completion_loader >/dev/null; then
        _completion_loader cargo
    fi
fi
if [[ $(complete -p cargo 2>/dev/null) =~ -F\ ([^ ]+) && ${BASH_REMATCH[1]} != _iot_xtask ]]; then
    _iot_xtask_before=${BASH_REMATCH[1]}
fi
complete -o bashdefault -o default -F _iot_xtask cargo
