//! Collects the output of failed tests, so that the end of a long log shows it again.

/// The maximum number of lines that are kept of one test. The step's own output has them all.
const MAX_LINES: usize = 40;

/// The failed tests of a step, with the output that libtest prints for each below `---- NAME stdout ----`.
#[derive(Debug, Default)]
pub(super) struct FailedTests {
    tests: Vec<(String, Vec<String>)>,
    is_open: bool,
}

impl FailedTests {
    pub(super) fn read(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.tests.push((name.to_owned(), Vec::new()));
            self.is_open = true;
        } else if line == "failures:" {
            self.is_open = false;
        } else if let Some((_, lines)) = self.tests.last_mut().filter(|_| self.is_open)
            && lines.len() < MAX_LINES
            && !(lines.is_empty() && line.is_empty())
        {
            lines.push(line.to_owned());
        }
    }

    /// Returns one text for each failed test: its name, and below it its indented output.
    pub(super) fn texts(&self) -> impl Iterator<Item = String> {
        self.tests.iter().map(|(name, lines)| {
            let output = lines.iter().map(|line| format!("\n  {line}").trim_end_matches(' ').to_owned());
            format!("{name}{}", output.collect::<String>().trim_end())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_each_failed_test_is_collected() {
        let mut failed = FailedTests::default();
        let long = "a long line\n".repeat(2 * MAX_LINES);
        let output = format!(
            "running 3 tests\ntest a ... ok\ntest b ... FAILED\n\nfailures:\n\n---- b stdout ----\n\nthread 'b' panicked at b.rs:1:\nno\n\n\
             ---- m::c stdout ----\n{long}\n\nfailures:\n    b\n    m::c\n\ntest result: FAILED. 1 passed; 2 failed;\n"
        );
        output.lines().for_each(|line| failed.read(line));
        let texts: Vec<_> = failed.texts().collect();
        assert_eq!(texts.len(), 2);
        assert_eq!(texts[0], "b\n  thread 'b' panicked at b.rs:1:\n  no");
        assert!(texts[1].starts_with("m::c\n  a long line\n  a long line"), "{}", texts[1]);
        assert_eq!(texts[1].lines().count(), 1 + MAX_LINES);
    }
}
