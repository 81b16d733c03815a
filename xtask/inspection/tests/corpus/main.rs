//! Judges files that others have published, and compares the findings with those of `xtask/inspect/corpus.toml`.
//! `cargo xtask soak --corpus` runs the test that fetches the files from the registries of PyPI, npm and Debian.

mod entries;
mod fetch;
mod judge;

use std::collections::{BTreeMap, BTreeSet};

use entries::{Corpus, Half, Truth};
use fetch::Fetched;
use judge::{Outcome, Tally};

const CORPUS: &str = include_str!("../../../inspect/corpus.toml");

#[test]
fn the_corpus_says_for_each_file_what_is_true_and_how_that_is_known() {
    let corpus = Corpus::parse(CORPUS);
    let mut seen = BTreeSet::new();
    for file in &corpus.files {
        let name = file.name();
        assert!(seen.insert((&file.archive, &file.member, &file.device)), "{name} occurs twice");
        assert!(
            file.sha256.len() == 64 && file.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()),
            "{name}"
        );
        assert!(!file.how.is_empty(), "{name}: how is the truth known?");
        assert!(!file.archive.contains('/') && !file.archive.starts_with('-'), "{name}: {}", file.archive);
        assert_eq!(file.half, Half::of(file.source, &file.package), "{name}");
        let is_known = |id: &&String| file.expect[*id] != "refused" && file.expect[*id] != "warned";
        assert_eq!(file.expect.keys().find(is_known), None, "{name}");
        if !file.expect.values().any(|severity| severity == "refused") && file.truth == Truth::Fails {
            assert!(!file.why.is_empty(), "{name} fails and is not refused: why?");
        }
    }
    let digests: BTreeMap<_, _> = corpus.files.iter().map(|file| (&file.archive, &file.sha256)).collect();
    let is_other = |file: &&entries::File| digests[&file.archive] != &file.sha256;
    assert!(!corpus.files.iter().any(|file| is_other(&file)), "an archive has two digests");
}

#[test]
#[ignore = "it fetches gigabytes; run cargo xtask soak --corpus"]
fn the_corpus_is_judged_as_recorded() {
    let corpus = Corpus::parse(CORPUS);
    let mut tally = Tally::default();
    let mut unreached: BTreeSet<_> = corpus.files.iter().map(|file| file.source).collect();
    for (archive, files) in corpus.by_archive() {
        let source = files[0].source;
        match fetch::archive(source, archive, files[0]) {
            Ok(Fetched::At(path)) => {
                unreached.remove(&source);
                let unpacked = fetch::unpack(&path);
                for file in files {
                    tally.add(file, judge::outcome(&corpus, file, unpacked.path()));
                }
            }
            Ok(Fetched::Gone(why)) => {
                files.iter().for_each(|file| tally.add(file, Outcome::Gone(why.clone())))
            }
            Err(why) => panic!("fetch {archive}: {why:#}"),
        }
    }
    println!("{tally}");
    // Single versions vanish from a mirror. A source without any package was not reached.
    assert!(unreached.is_empty(), "no package was fetched from {unreached:?}: check this host's network");
    assert!(tally.differences.is_empty(), "{} files are judged differently", tally.differences.len());
}
