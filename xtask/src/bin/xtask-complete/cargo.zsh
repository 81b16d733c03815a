
# cargo xtask, in this workspace: cargo's own completion calls the function of this name for a subcommand that it does not know.
_cargo-xtask() {
    if [[ $PWD/ == @ROOT@/* ]]; then
        words[1]=cargo-xtask
        _clap_dynamic_completer_cargo_xtask
    else
        _default
    fi
}
