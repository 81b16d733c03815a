
# Completes cargo xtask in this workspace. Everything else goes to the function that completed cargo before.
_iot_xtask() {
    if [[ $COMP_CWORD -lt 2 || ${COMP_WORDS[1]} != xtask || ! -x @COMPLETER@ || $(pwd -P)/ != @ROOT@/* ]]; then
        [[ -z ${_iot_xtask_before-} ]] || "$_iot_xtask_before" "$@"
        return
    fi
    # bash splits --flag=value into three words.
    local -a words=(cargo-xtask)
    local word last=0 flag=
    for word in "${COMP_WORDS[@]:2:COMP_CWORD-1}"; do
        if [[ $last -gt 0 && ($word == = && ${words[last]} == --* || ${words[last]} == --*=) ]]; then
            words[last]+=$word
        else
            words[++last]=$word
        fi
    done
    [[ ${words[last]} != --*=* ]] || flag=${words[last]%%=*}=
    # The copy goes through another array: some versions of bash empty an array that is made local from itself.
    local -a COMP_WORDS=("${words[@]}")
    local COMP_CWORD=$last
    _clap_complete_cargo_xtask cargo-xtask "${words[last]}" "${words[last - 1]}"
    COMPREPLY=("${COMPREPLY[@]#"$flag"}")
}
if ! complete -p cargo &>/dev/null; then
    # bash-completion loads the script of a command when it is first completed: with _comp_load since 2.12, with
    # _completion_loader in older versions.
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
