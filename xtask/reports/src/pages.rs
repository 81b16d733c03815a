//! Validates the reports of each verdict with validators from npm and PyPI, and takes pictures of the pages in a real
//! Chromium: light, dark, and as wide as a phone. `cargo xtask soak --reports` runs this test and prints where the
//! pictures are, because a person must look at them.

use std::path::Path;
use std::process::Command;

use xtask_core::format::name_of;
use xtask_core::message;
use xtask_core::report::{HTML, JUNIT, past::PastRun};

use crate::{Evidence, html, junit, samples};

/// html-validate's recommended rules, without the one against `style` attributes, which set the lengths of bars.
const VALIDATE: &[&str] =
    &["--yes", "html-validate@10", "--preset", "recommended", "--rule", "no-inline-style:off"];

const COUNT: &str = "import sys, junitparser
for suite in junitparser.JUnitXml.fromfile(sys.argv[1]): print(suite.tests, suite.failures, suite.errors, suite.skipped)";

/// The arguments of a Chromium that connects to nothing.
const CHROMIUM: &[&str] = &[
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
];

/// The name of a picture, the size of its window in pixels, and the arguments of Chromium.
const PICTURES: &[(&str, &str, &[&str])] = &[
    ("light", "1200,2400", &[]),
    ("dark", "1200,2400", &["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]),
    ("phone", "390,2400", &[]),
];

fn run(command: &mut Command) -> String {
    let output =
        command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; install this program"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn validators_accept_the_reports_of_each_verdict_and_a_browser_shows_them() {
    // The directory of the test binary is in the target directory.
    let root = std::env::current_exe().unwrap().with_file_name("xtask-report-pages");
    std::fs::create_dir_all(&root).unwrap();
    let environment = root.join("python");
    run(Command::new("python3").args(["-m", "venv"]).arg(&environment));
    let python = environment.join("bin/python");
    run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "junitparser==4.*"]));
    let reports = [samples::verified(), samples::failed(), samples::unavailable(), samples::interrupted()];
    let counts = ["12 0 0 0", "12 1 0 1", "12 0 1 4", "12 0 1 6"];
    let past: Vec<_> = reports.iter().map(PastRun::from).collect();
    for (report, counts) in reports.iter().zip(counts) {
        let directory = root.join(name_of(&report.verdict));
        std::fs::create_dir_all(&directory).unwrap();
        let evidence = Evidence {
            console: b"[    1.0] Linux version 6.1\n".repeat(20),
            journal: b"iot-agent: connected <ok>\n".to_vec(),
            guest: b"ActiveState=active\n".to_vec(),
            past: past.clone(),
        };
        let page = directory.join(HTML);
        std::fs::write(&page, html(report, &evidence)).unwrap();
        std::fs::write(directory.join(JUNIT), junit(report).unwrap()).unwrap();
        run(Command::new("npx").args(VALIDATE).arg(&page));
        let counted = run(Command::new(&python).args(["-c", COUNT]).arg(directory.join(JUNIT)));
        assert_eq!(counted.trim(), counts);
        take_pictures(&page);
    }
    let broken = root.join("broken.html");
    std::fs::write(&broken, "<!DOCTYPE html><html lang=\"en\"><p><div></p></html>").unwrap();
    let refused = Command::new("npx").args(VALIDATE).arg(&broken).output().unwrap();
    assert!(!refused.status.success(), "the validator accepts everything");
}

fn take_pictures(page: &Path) {
    let profile = tempfile::tempdir().unwrap();
    let mut pictures = Vec::new();
    for (name, size, arguments) in PICTURES {
        let picture = page.with_file_name(format!("{name}.png"));
        let mut chromium = Command::new("chromium");
        chromium.args(CHROMIUM).args(*arguments);
        chromium.arg(format!("--user-data-dir={}", profile.path().join(name).display()));
        chromium.args([format!("--window-size={size}"), format!("--screenshot={}", picture.display())]);
        run(chromium.arg(format!("file://{}", page.display())));
        message!("{}", picture.display());
        pictures.push(std::fs::read(&picture).unwrap());
    }
    assert!(pictures[0] != pictures[1], "the dark page looks like the light one");
}
