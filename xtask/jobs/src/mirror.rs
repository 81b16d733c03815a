//! Finds the sources of Debian's packages: this host's own mirror and proxies, as apt reports them.

use std::ffi::OsString;

use anyhow::{Context, Result};
use xtask_core::host::tools;
use xtask_core::image::{Image, Source};
use xtask_core::limits;

use crate::{Ui, child};

/// Returns apt's source lines for `suite`, with the Debian mirror that this host itself uses. The host may have
/// another suite or architecture. The list is empty if the host has no such mirror (Ubuntu, Fedora). mmdebstrap then
/// uses its own default.
///
/// # Errors
/// Returns an error if apt does not answer.
pub fn debian_sources(suite: &str, ui: &Ui) -> Result<Vec<String>> {
    let Some(apt) = tools::find("apt-get") else { return Ok(Vec::new()) };
    let format = "$(REPO_URI)|$(RELEASE)|$(ORIGIN)|$(CREATED_BY)";
    let arguments = ["indextargets", "--format", format].map(OsString::from);
    let output =
        child::read(&apt, &arguments, limits::SERVER_START, ui).context("ask apt for its package mirrors")?;
    Ok(sources_for(&output, suite))
}

/// Returns apt's source lines for a guest with this image: the mirrors of this host, or Debian's public mirrors if the
/// guest cannot reach those of this host. Returns none for an image that was not built from packages, because it has
/// the sources of its publisher.
///
/// # Errors
/// Returns an error if apt does not answer.
pub fn guest_sources(image: &Image, ui: &Ui) -> Result<Vec<String>> {
    let Source::Packages(recipe) = &image.source else { return Ok(Vec::new()) };
    Ok(reachable(debian_sources(&recipe.suite, ui)?, &recipe.suite))
}

/// Returns these lines if a guest can reach all of their mirrors, and otherwise lines with Debian's mirrors.
fn reachable(lines: Vec<String>, suite: &str) -> Vec<String> {
    let is_remote = |line: &String| {
        let uri = line.split(' ').nth(1).unwrap_or_default();
        let host = uri.strip_prefix("http://").or_else(|| uri.strip_prefix("https://"));
        host.is_some_and(|host| !["localhost", "127.", "[::1]"].iter().any(|own| host.starts_with(own)))
    };
    if !lines.is_empty() && lines.iter().all(is_remote) {
        return lines;
    }
    public_sources(suite)
}

/// Returns apt's source lines for `suite` with Debian's public mirrors.
pub fn public_sources(suite: &str) -> Vec<String> {
    let mirror = "http://deb.debian.org/debian";
    vec![
        format!("deb {mirror} {suite} main"),
        format!("deb {mirror} {suite}-updates main"),
        format!("deb {mirror}-security {suite}-security main"),
    ]
}

fn sources_for(index_targets: &str, suite: &str) -> Vec<String> {
    let rows: Vec<Vec<&str>> = index_targets.lines().map(|line| line.split('|').collect()).collect();
    let mirror = |security: bool| {
        let fits = |row: &&Vec<&str>| match row.as_slice() {
            [_, release, origin, "Packages"] => {
                // Before the first `apt-get update`, apt reports no origin. Then only the name of the suite is left to
                // compare, although a third party's suite may have the same name.
                let debians = match *origin {
                    "" => release.split('-').next() == Some(suite),
                    origin => origin == "Debian",
                };
                debians && release.ends_with("-security") == security
            }
            _ => false,
        };
        let of_suite = rows.iter().filter(fits).find(|row| row[1].split('-').next() == Some(suite));
        of_suite.or_else(|| rows.iter().find(fits)).map(|row| row[0])
    };
    let mut sources = Vec::new();
    if let Some(uri) = mirror(false) {
        sources.push(format!("deb {uri} {suite} main"));
        sources.push(format!("deb {uri} {suite}-updates main"));
    }
    if let Some(uri) = mirror(true) {
        sources.push(format!("deb {uri} {suite}-security main"));
    }
    sources
}

/// Returns this host's proxies for the mirror, since mmdebstrap's apt does not read the host's configuration. They are
/// passed in the environment: every user can read a command line, and a proxy's address may contain a password.
///
/// # Errors
/// Returns an error if apt does not answer.
pub fn proxies(ui: &Ui) -> Result<Vec<(&'static str, OsString)>> {
    let Some(apt_config) = tools::find("apt-config") else { return Ok(Vec::new()) };
    let arguments = ["dump", "--no-empty", "Acquire"].map(OsString::from);
    let output =
        child::read(&apt_config, &arguments, limits::SERVER_START, ui).context("ask apt for its proxies")?;
    Ok(proxies_in(&output))
}

fn proxies_in(dump: &str) -> Vec<(&'static str, OsString)> {
    let of = |option: &str| {
        let line = dump.lines().find_map(|line| line.strip_prefix(option)?.strip_prefix(' '));
        line.map(|value| OsString::from(value.trim_end_matches(';').trim_matches('"')))
    };
    let known = [("Acquire::http::Proxy", "http_proxy"), ("Acquire::https::Proxy", "https_proxy")];
    known.into_iter().filter_map(|(option, variable)| Some((variable, of(option)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_mirror_serves_every_suite_and_architecture() {
        let bookworm = "http://m/debian/|bookworm|Debian|Packages\nhttp://m/debian/|bookworm-updates|Debian|Packages\n\
                        http://s/debian/|bookworm-security|Debian|Packages\nhttp://x/|nodistro||Packages\n";
        assert_eq!(
            sources_for(bookworm, "bookworm"),
            [
                "deb http://m/debian/ bookworm main",
                "deb http://m/debian/ bookworm-updates main",
                "deb http://s/debian/ bookworm-security main"
            ]
        );
        let trixie = bookworm.replace("bookworm", "trixie");
        assert_eq!(sources_for(&trixie, "bookworm")[0], "deb http://m/debian/ bookworm main");
        let unread = "http://m/debian/|bookworm||Packages\n";
        assert_eq!(sources_for(unread, "bookworm").len(), 2, "before the first apt-get update");
        let third = format!("http://a/azure-cli/|bookworm|azure-cli bookworm|Packages\n{bookworm}");
        assert_eq!(sources_for(&third, "bookworm")[0], "deb http://m/debian/ bookworm main");
        let ubuntu = "http://u/ubuntu/|noble|Ubuntu|Packages\n";
        assert_eq!(sources_for(ubuntu, "bookworm"), Vec::<String>::new());
    }

    #[test]
    fn a_guest_gets_the_hosts_mirror_unless_it_cannot_reach_it() {
        let of = |uri: &str| reachable(vec![format!("deb {uri} bookworm main")], "bookworm");
        assert_eq!(of("http://m/debian"), ["deb http://m/debian bookworm main"]);
        for uri in ["file:/srv/debian", "http://localhost:3142/debian", "http://127.0.0.1/debian"] {
            assert_eq!(
                of(uri)[2],
                "deb http://deb.debian.org/debian-security bookworm-security main",
                "{uri}"
            );
        }
        assert_eq!(reachable(Vec::new(), "trixie").len(), 3, "a host without apt");
    }

    #[test]
    fn proxies_come_from_apts_own_words() {
        let dump =
            "Acquire::http::Proxy \"http://u:p@proxy:3128\";\nAcquire::http::Proxy::mirror \"DIRECT\";\n";
        assert_eq!(proxies_in(dump), [("http_proxy", OsString::from("http://u:p@proxy:3128"))]);
        assert!(proxies_in("Acquire \"\";\n").is_empty());
    }
}
