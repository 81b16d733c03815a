//! The page of a CI job on GitHub or Gitea, which shows annotations and a summary.

/// The variables that are `true` in a job on GitHub or Gitea.
const ACTIONS: [&str; 2] = ["GITHUB_ACTIONS", "GITEA_ACTIONS"];

/// The variable with the path of the file to which a job appends its summary.
pub const SUMMARY: &str = "GITHUB_STEP_SUMMARY";

/// The variables by which this program knows that it runs in a job.
pub const VARIABLES: [&str; 3] = [ACTIONS[0], ACTIONS[1], SUMMARY];

/// Returns whether this process runs in a job.
pub fn is_in_job() -> bool {
    ACTIONS.iter().any(|name| std::env::var_os(name).is_some_and(|value| value == "true"))
}

/// Returns a command that makes the runner of a job show an annotation: `::error title=TITLE::MESSAGE` ("Workflow
/// commands for GitHub Actions"). `kind` is `error`, `warning` or `notice`. The command must be at the start of a line.
pub fn annotation(kind: &str, title: &str, message: &str) -> String {
    let escaped = |text: &str| text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A");
    let title = escaped(title).replace(':', "%3A").replace(',', "%2C");
    format!("::{kind} title={title}::{}", escaped(message))
}

/// Returns a text in which the runner of a job finds no command. The runner accepts `::` at the start of a line, also
/// after spaces, and `##[` anywhere. A guest could otherwise forge an annotation.
pub fn defused(text: &str) -> String {
    let line = |line: &str| match line.trim_start().strip_prefix("::") {
        Some(rest) => format!("{}: :{rest}", &line[..line.len() - line.trim_start().len()]),
        None => line.to_owned(),
    };
    text.split('\n').map(line).collect::<Vec<_>>().join("\n").replace("##[", "# #[")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_the_guest_is_no_command() {
        assert_eq!(defused("a ::b\n  ::error::c\nx ##[add-mask]d"), "a ::b\n  : :error::c\nx # #[add-mask]d");
    }

    #[test]
    fn an_annotation_is_one_line() {
        assert_eq!(annotation("error", "a: b, c", "d\n::e 5%"), "::error title=a%3A b%2C c::d%0A::e 5%25");
    }
}
