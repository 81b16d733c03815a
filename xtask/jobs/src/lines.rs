//! The width of the screen, and lines that fit into it.

/// The column at which the detail of a phase begins: after the title, the outcome and the time.
pub(crate) const DETAIL: usize = 29;
/// The maximum width of a sign of life if there is no terminal.
pub(crate) const LOG_WIDTH: usize = 120;

/// Returns the width of the terminal that stderr is; `None` if it is not a terminal or does not tell.
pub(crate) fn width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(std::io::stderr()).ok()?;
    (size.ws_col > 0).then_some(size.ws_col.into())
}

/// Breaks a line between words, so that a terminal of this width does not break a word. With an indent, all later lines
/// begin in that column. Without one, they begin four columns to the right of the first line. A text that is not for a
/// terminal stays one line.
pub(crate) fn wrapped(text: &str, width: Option<usize>, indent: usize) -> String {
    let Some(width) = width.filter(|width| *width > indent) else { return text.to_owned() };
    let own = text.len() - text.trim_start().len();
    let (first, rest) = (" ".repeat(own), " ".repeat(if indent > 0 { 0 } else { own + 4 }));
    let options = textwrap::Options::new(width - indent)
        .break_words(false)
        .word_splitter(textwrap::WordSplitter::NoHyphenation)
        .initial_indent(&first)
        .subsequent_indent(&rest);
    let lines = textwrap::wrap(text.trim_start(), options);
    lines.join(&format!("\n{}", " ".repeat(indent)))
}

/// Returns the beginning of a text that has at most `room` characters and ends between two words.
pub(crate) fn cut(text: &str, room: usize) -> String {
    let Some((end, _)) = text.char_indices().nth(room) else { return text.to_owned() };
    let end = text[..end].char_indices().next_back().map_or(0, |(end, _)| end);
    let end = text[..end].rfind(' ').unwrap_or(end);
    format!("{}…", text[..end].trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_broken_between_words_on_a_terminal_alone() {
        let detail =
            "revision 25, boot 5e867b32, sha256 40474105643b…; the workload without a broker after 72 s";
        for (width, count) in [(80, 2), (120, 1)] {
            let wrapped = wrapped(detail, Some(width), DETAIL);
            let lines: Vec<_> = wrapped.lines().collect();
            assert_eq!(lines.len(), count, "{wrapped}");
            assert!(DETAIL + lines[0].chars().count() <= width, "{wrapped}");
            for line in &lines[1..] {
                assert!(line.starts_with(&" ".repeat(DETAIL)) && line.chars().count() <= width, "{wrapped}");
            }
            let words: Vec<_> = wrapped.split_whitespace().collect();
            assert_eq!(words.join(" "), detail);
        }
        assert_eq!(wrapped(detail, None, DETAIL), detail);
        assert_eq!(wrapped("  caused by: a b", Some(14), 0), "  caused by: a\n      b");
        let path = "/a/path/that/is/longer/than/the/terminal";
        assert_eq!(wrapped(path, Some(20), 0), path);
    }

    #[test]
    fn a_sign_of_life_is_cut_between_words() {
        assert_eq!(cut("Started a service", 30), "Started a service");
        assert_eq!(cut("Started a service", 17), "Started a service");
        assert_eq!(cut("Started a service", 14), "Started a…");
        assert_eq!(cut("Startedaservice", 5), "Star…");
        assert_eq!(cut("Started", 0), "…");
    }
}
