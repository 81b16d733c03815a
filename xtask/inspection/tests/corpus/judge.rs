//! Judges one file of the corpus, and counts the results.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use inspect::device;
use inspect::finding::Severity;
use inspect::isa::Isa;
use inspect::{Offers, Page, Target};

use crate::entries::{Corpus, File, Half, Truth};

/// What became of a file of the corpus.
pub(crate) enum Outcome {
    /// The findings: id and severity, without those that only inform.
    Judged(BTreeMap<String, String>),
    /// The registry no longer has the package.
    Gone(String),
}

/// Judges a file of an unpacked package. Only the release of the device's glibc is known.
pub(crate) fn outcome(corpus: &Corpus, file: &File, root: &Path) -> Outcome {
    let path = xtask_archives::resolve(root, Path::new(&file.member));
    let path = path.ok().flatten().unwrap_or_else(|| panic!("{}: no such file", file.name()));
    let bytes = std::fs::read(root.join(path)).unwrap_or_else(|why| panic!("{}: {why}", file.name()));
    let device = device::find(Isa::Aarch64, &file.device).unwrap_or_else(|| panic!("{}", file.device));
    let mut target = Target::new("aarch64", "/lib/ld-linux-aarch64.so.1", &device);
    let page =
        |bytes: &u64| Page { bytes: *bytes, whose: "a kernel of the device".to_owned(), certain: true };
    target.pages = device.page_sizes.iter().map(page).collect();
    target.offers = Offers::Release { glibc: &corpus.glibc };
    target.place = format!("a system with glibc {}", corpus.glibc);
    let mut worst: BTreeMap<&str, Severity> = BTreeMap::new();
    for finding in inspect::inspect(&bytes, &target).findings {
        let severity = worst.entry(finding.id).or_insert(finding.severity);
        *severity = finding.severity.max(*severity);
    }
    worst.retain(|_, severity| *severity > Severity::Informs);
    Outcome::Judged(worst.into_iter().map(|(id, severity)| (id.to_owned(), severity.to_string())).collect())
}

/// The counts of one half of the corpus, with the names of the files that are not right.
#[derive(Default)]
struct Counts {
    judged: usize,
    right: usize,
    fails: usize,
    false_alarms: Vec<String>,
    misses: Vec<String>,
    only_warned: Vec<String>,
    needless: Vec<String>,
    needless_instructions: Vec<String>,
    gone: Vec<String>,
}

impl Counts {
    fn add(&mut self, file: &File, findings: &BTreeMap<String, String>) {
        let has = |severity: &str| findings.values().any(|found| found == severity);
        let name = || format!("{} ({findings:?})", file.name());
        self.judged += 1;
        self.fails += usize::from(file.truth == Truth::Fails);
        match file.truth {
            Truth::Runs if has("refused") => self.false_alarms.push(name()),
            Truth::Runs if has("warned") => self.needless.push(name()),
            Truth::Fails if findings.is_empty() => self.misses.push(name()),
            Truth::Runs | Truth::Fails => self.right += 1,
        }
        if file.truth == Truth::Fails && has("warned") && !has("refused") {
            self.only_warned.push(name());
        }
        if file.truth == Truth::Runs && findings.get("instructions").is_some_and(|found| found == "warned") {
            self.needless_instructions.push(file.name());
        }
    }
}

/// The counts of both halves, and the files whose findings differ from the recorded ones.
#[derive(Default)]
pub(crate) struct Tally {
    seen: Counts,
    held: Counts,
    pub(crate) differences: Vec<String>,
}

impl Tally {
    pub(crate) fn add(&mut self, file: &File, outcome: Outcome) {
        let counts = match file.half {
            Half::Seen => &mut self.seen,
            Half::Held => &mut self.held,
        };
        match outcome {
            Outcome::Gone(why) => counts.gone.push(format!("{}: {why}", file.name())),
            Outcome::Judged(findings) => {
                counts.add(file, &findings);
                if findings != file.expect {
                    let name = file.name();
                    self.differences.push(format!("{name}: {findings:?}, recorded are {:?}", file.expect));
                }
            }
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (title, counts) in [("looked at while fixing", &self.seen), ("held back", &self.held)] {
            writeln!(f, "{title}: {} files, of which {} fail", counts.judged, counts.fails)?;
            writeln!(f, "  right: {}", counts.right)?;
            let lists = [
                ("false alarms", &counts.false_alarms),
                ("misses", &counts.misses),
                ("failing files that are only warned of", &counts.only_warned),
                ("needless warnings", &counts.needless),
                ("of these by instructions", &counts.needless_instructions),
                ("not available", &counts.gone),
            ];
            for (what, names) in lists {
                writeln!(f, "  {what}: {}", names.len())?;
                names.iter().try_for_each(|name| writeln!(f, "    {name}"))?;
            }
        }
        writeln!(f, "judged differently from the record: {}", self.differences.len())?;
        self.differences.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

#[test]
fn each_file_is_counted_once_and_each_difference_is_named() {
    let entry = |truth: &str, expect: &str| {
        let text = format!(
            "glibc = \"2.36\"\n[[file]]\nsource = \"npm\"\npackage = \"p\"\nversion = \"1\"\narchive = \"p.tgz\"\n\
             sha256 = \"\"\nmember = \"m\"\ndevice = \"pi5\"\nhalf = \"held\"\nexpect = {{ {expect} }}\n\
             truth = \"{truth}\"\nhow = \"h\""
        );
        Corpus::parse(&text).files.remove(0)
    };
    let findings = |found: &[(&str, &str)]| {
        Outcome::Judged(
            found.iter().map(|(id, severity)| ((*id).to_owned(), (*severity).to_owned())).collect(),
        )
    };
    let mut tally = Tally::default();
    tally.add(&entry("runs", ""), findings(&[]));
    tally.add(&entry("runs", ""), findings(&[("needed", "refused")]));
    tally.add(&entry("runs", "instructions = \"warned\""), findings(&[("instructions", "warned")]));
    tally.add(&entry("fails", "needed = \"refused\""), findings(&[]));
    tally.add(&entry("fails", "needed = \"refused\""), findings(&[("needed", "refused")]));
    tally.add(&entry("fails", ""), Outcome::Gone("no such version".to_owned()));
    let (seen, held) = (&tally.seen, &tally.held);
    assert_eq!((seen.judged, held.judged, held.right, held.fails), (0, 5, 2, 2));
    let named = [&held.false_alarms, &held.misses, &held.needless, &held.needless_instructions, &held.gone];
    assert_eq!(named.map(Vec::len), [1; 5]);
    assert_eq!(tally.differences.len(), 2, "{tally}");
}
