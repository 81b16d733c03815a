
# Completes cargo xtask in this workspace. Everything else is left to cargo's own completion.
function __iot_xtask_asked
    set --local words (commandline --current-process --tokenize --cut-at-cursor)
    test "$words[2]" = xtask -a -x @COMPLETER@; and string match --quiet -- '@ROOT@/*' (pwd -P)/
end
function __iot_xtask_candidates
    set --local words (commandline --current-process --tokenize --cut-at-cursor)
    @ASKS@=fish @COMPLETER@ -- $words[2..] (commandline --current-token)
end
complete --keep-order --exclusive --command cargo --condition __iot_xtask_asked --arguments "(__iot_xtask_candidates)"
