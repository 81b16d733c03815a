
# Completes cargo xtask in this workspace. For a subcommand that cargo's own completion does not know, it calls the
# function _cargo-SUBCOMMAND.
_cargo-xtask() {
    if [[ -x @COMPLETER@ && ${PWD:A}/ == @ROOT@/* ]]; then
        words[1]=cargo-xtask
        _clap_dynamic_completer_cargo_xtask
    else
        _default
    fi
}
# zsh has no completion for cargo itself. rustup installs one, but in a directory that zsh does not search.
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
