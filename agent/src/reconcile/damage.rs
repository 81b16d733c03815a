//! Detects damage of podman's storage, and decides how far the repair must go: to another container, to another
//! download of the image, or to a reset of the storage.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::reset;

/// Failures of a deployment before its image is fetched again. After each failure, the agent makes another container.
const BEFORE_FETCH: u32 = 2;
/// Failures of a deployment before the storage is reset. With the pauses between them, they take about seven minutes.
const BEFORE_RESET: u32 = 10;
/// The time without an answer of podman before its service is ended. The limit of one request is as long, so this is after
/// the second request.
const HANG: Duration = Duration::from_secs(30);
/// The time without an answer of podman before the storage is reset.
const SILENCE: Duration = Duration::from_secs(3600);

/// Words of podman's errors about its storage.
const OF_STORAGE: [&str; 4] = ["layer not known", "locating item named", "mounting storage", "graph driver"];
/// Words of podman's errors about a file of its storage that is torn, or about an answer of a registry that is.
const OF_CONTENT: [&str; 2] = ["unexpected end of JSON", "invalid memory address"];
/// The agent's own words about a download. The other words of such an error can come from a registry or an
/// archive.
const OF_DOWNLOADS: [&str; 2] = ["pull the image", "load the image archive"];
/// Words of errors with other causes: a full disk, no memory, a card that fails, and files in a container, which a
/// document can name.
const OF_OTHERS: [&str; 5] =
    ["no space left", "cannot allocate memory", "read-only file system", "input/output error", "/merged/"];
const MISSING: &str = "no such file or directory";

/// Returns whether an error is about podman's storage.
fn is_of_storage(error: &str) -> bool {
    let has = |words: &[&str]| words.iter().any(|words| error.contains(words));
    let is_layer_missing = error.contains("/overlay/") && error.contains(MISSING);
    let is_torn = has(&OF_CONTENT) && !has(&OF_DOWNLOADS);
    (has(&OF_STORAGE) || is_torn || is_layer_missing) && !has(&OF_OTHERS)
}

/// Returns whether an error says that the program of a container is missing, which can also be the document's fault.
fn is_of_program(error: &str) -> bool {
    error.contains("exec") && (error.contains(MISSING) || error.contains("executable file"))
}

#[derive(Debug, Default)]
pub(super) struct Damage {
    /// The failures of each deployment since its container ran.
    failures: HashMap<String, Failures>,
    /// The images that this process has fetched again.
    fetched_again: HashSet<String>,
    /// The time since which podman has not answered.
    silent: Option<Instant>,
    /// The time since which podman has let requests wait. `None` if it has answered or refused the last one.
    hanging: Option<Instant>,
    /// The last reason why a reset was not requested.
    refusal: String,
}

#[derive(Debug, Default)]
struct Failures {
    /// The failures because of the storage or of a missing program.
    all: u32,
    of_storage: u32,
}

impl Damage {
    /// Records a failure of a deployment. `has_worked` is true if a container of the same document has worked before.
    pub(super) fn failed(&mut self, deployment: &str, error: &str, has_worked: bool) {
        let is_of_storage = is_of_storage(error);
        if is_of_storage || has_worked && is_of_program(error) {
            let failures = self.failures.entry(deployment.to_owned()).or_default();
            failures.all += 1;
            failures.of_storage += u32::from(is_of_storage);
        }
    }

    pub(super) fn works(&mut self, deployment: &str) {
        self.failures.remove(deployment);
    }

    /// Drops the deployments for which `is_known` is false.
    pub(super) fn retain(&mut self, is_known: impl Fn(&str) -> bool) {
        self.failures.retain(|name, _| is_known(name));
    }

    /// Returns whether the image of a deployment must be fetched again, which is tried once.
    pub(super) fn must_fetch_again(&mut self, deployment: &str, image: &str) -> bool {
        let failures = self.failures.get(deployment).map_or(0, |failures| failures.all);
        failures >= BEFORE_FETCH && self.fetched_again.insert(image.to_owned())
    }

    /// Records whether podman has let a request wait. Returns whether podman hangs and must be ended. It then gets as much
    /// time again.
    pub(super) fn must_end(&mut self, has_waited: bool, now: Instant) -> bool {
        if !has_waited {
            self.hanging = None;
            return false;
        }
        let since = *self.hanging.get_or_insert(now);
        let hangs = now.duration_since(since) >= HANG;
        if hangs {
            self.hanging = None;
        }
        hangs
    }

    /// Records whether podman has answered.
    pub(super) fn answered(&mut self, has_answered: bool, now: Instant) {
        self.silent = (!has_answered).then(|| self.silent.unwrap_or(now));
    }

    pub(super) fn is_silent(&self) -> bool {
        self.silent.is_some()
    }

    /// Returns the reason if the storage is beyond repair.
    pub(super) fn is_beyond_repair(&self, now: Instant) -> Option<String> {
        if self.silent.is_some_and(|since| now - since >= SILENCE) {
            return Some(format!("{} for {} minutes", reset::SILENCE, SILENCE.as_secs() / 60));
        }
        let is_beyond = |failures: &Failures| failures.of_storage >= BEFORE_RESET;
        let (name, _) = self.failures.iter().find(|(_, failures)| is_beyond(failures))?;
        Some(format!("the container of {name} could not be started {BEFORE_RESET} times"))
    }

    /// Begins to count again, after a request for a reset.
    pub(super) fn requested(&mut self) {
        *self = Self::default();
    }

    /// Records the reason why no reset was requested. Returns whether it is new.
    pub(super) fn is_new_refusal(&mut self, reason: &str) -> bool {
        let is_new = self.refusal != reason;
        reason.clone_into(&mut self.refusal);
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repair_goes_further_with_each_failure() {
        let (mut damage, now) = (Damage::default(), Instant::now());
        let error =
            "start the container: mounting storage for container 5a5f: stat /s/overlay/69: no such file";
        let mut fetched = Vec::new();
        for count in 1..=BEFORE_RESET {
            assert_eq!(damage.is_beyond_repair(now), None);
            damage.failed("web", error, false);
            if damage.must_fetch_again("web", "r.example/web:1") {
                fetched.push(count);
            }
        }
        assert_eq!(fetched, [BEFORE_FETCH]);
        assert!(damage.is_beyond_repair(now).unwrap().contains("web"));
        damage.works("web");
        assert_eq!(damage.is_beyond_repair(now), None);
    }

    #[test]
    fn a_wrong_document_a_full_disk_and_a_wrong_registry_are_no_damage() {
        let mut damage = Damage::default();
        // A proxy answers the request for a token with an empty document.
        let token = "pull the image r.example/web:1: initializing source: unexpected end of JSON input";
        let program = "exec: \"/program\": stat /program: no such file or directory";
        let mount = "mounting \"/v/_data\" to rootfs at \"/data\": /s/overlay/69/merged/data: no such file or directory";
        for (error, has_worked, counts) in [
            ("layer not known", false, [1, 1]),
            ("stat /s/overlay/e63e: no such file or directory", false, [1, 1]),
            (program, true, [1, 0]),
            (program, false, [0, 0]),
            (mount, true, [0, 0]),
            ("mounting storage for container 5a5f: no space left on device", true, [0, 0]),
            ("address already in use", true, [0, 0]),
            (token, true, [0, 0]),
            ("look for the image r.example/web:1: unexpected end of JSON input", true, [1, 1]),
        ] {
            damage.works("web");
            damage.failed("web", error, has_worked);
            let counted = damage.failures.get("web").map(|failures| [failures.all, failures.of_storage]);
            assert_eq!(counted.unwrap_or_default(), counts, "{error}");
        }
    }

    #[test]
    fn a_podman_that_answers_again_is_not_reset() {
        let (mut damage, now) = (Damage::default(), Instant::now());
        damage.answered(false, now);
        damage.answered(false, now + SILENCE / 2);
        assert_eq!(damage.is_beyond_repair(now + SILENCE / 2), None);
        assert!(damage.is_beyond_repair(now + SILENCE).is_some());
        damage.answered(true, now + SILENCE);
        assert_eq!(damage.is_beyond_repair(now + SILENCE), None);
    }

    #[test]
    fn a_podman_that_lets_two_requests_wait_is_ended_and_gets_time_again() {
        let (mut damage, now) = (Damage::default(), Instant::now());
        assert!(!damage.must_end(true, now));
        assert!(!damage.must_end(true, now + HANG / 2));
        assert!(damage.must_end(true, now + HANG));
        assert!(!damage.must_end(true, now + HANG), "the new one has just started");
        assert!(!damage.must_end(false, now + 2 * HANG));
        assert!(!damage.must_end(true, now + 3 * HANG), "it has answered meanwhile");
        assert!(damage.must_end(true, now + 4 * HANG));
    }
}
