
# cargo xtask, in this workspace: cargo's own completion calls the function of this name for a subcommand that it does not know.
_cargo-xtask() {
    if [[ -x @COMPLETER@ && ${PWD:A}/ == @ROOT@/* ]]; then
        words[1]=cargo-xtask
        _clap_dynamic_completer_cargo_xtask
    else
        _default
    fi
}
# zsh has none for cargo itself; rustup brings one, where nobody looks for it.
if (( ! $+_comps[cargo] )); then
    _iot_xtask() {
        if [[ $CURRENT -gt 2 && $words[2] == xtask ]]; then
            shift words
            (( CURRENT-- ))
            _cargo-xtask
        else
            _default
        fi
    }
    compdef _iot_xtask cargo
fi
