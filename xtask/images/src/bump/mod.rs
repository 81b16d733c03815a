//! `cargo xtask image bump` pins the newest release of an image. A *pin* is an entry of the catalogue with the URL and
//! the digest of an image's file. Publishers keep dated releases for some months. Only this command changes a pin.
//!
//! The digests come from the publisher's own list, which is trusted because of its signature. If a publisher signs
//! nothing, the user must pass `--unsigned`, and the output says that only the TLS connection protects the digests.

mod catalogue;
mod diff;
mod index;
mod pin;
mod remote;
mod rewrite;
mod signature;
mod sums;

use anyhow::{Context, Result, bail};
use reqwest::Url;
use serde_json::{Value, json};
use xtask_core::bail_guest;
use xtask_core::cli::{BumpArgs, Verbosity};
use xtask_core::error::{Failure, host_fault};
use xtask_core::image::shown;
use xtask_core::message;
use xtask_core::output::{print_json, write};
use xtask_core::workspace::Workspace;

use self::catalogue::{BumpEntry, CatalogueText};
use self::index::Date;
use self::pin::Pin;
use self::remote::Http;
use self::signature::{Signer, Verifier};
use xtask_jobs::Ui;

/// Limits in bytes. Ubuntu's listings have some 100 KiB, Debian's less.
const MAX_LISTING: u64 = 4 << 20;
const MAX_SUMS: u64 = 4 << 20;
const MAX_SIGNATURE: u64 = 1 << 20;

/// The reason to trust a list of digests.
enum Trust<'a> {
    /// The name of the signature beside the list, and its verifier.
    Signed(&'a str, Verifier),
    /// Only the connection protects the list.
    Connection,
}

/// A publisher's newest release.
struct Newest {
    date: Date,
    pins: Vec<Pin>,
    signer: Option<Signer>,
}

pub(crate) fn run(workspace: &Workspace, args: &BumpArgs, verbosity: Verbosity) -> Result<()> {
    let ui = Ui::install(verbosity)?;
    let default = workspace.root().join("xtask/core/images.toml");
    let path = args.catalogue.as_deref().unwrap_or(&default);
    let catalogue = CatalogueText::load(path)?;
    let entry = catalogue.entry(&args.name)?;
    let trust = Trust::in_entry(&entry, args)?;
    let bump = Bump { remote: &Http::new(&ui)?, entry: &entry, ui: &ui };
    let newest = bump.newest(&trust)?;
    let text = catalogue.with(&entry.name, &newest.pins)?;
    let changed = text != catalogue.text;
    if changed && !args.dry_run {
        let hint = "check that this user may write there and that the disk is not full";
        catalogue.replace(&text).map_err(|error| host_fault(error, "rewrite the catalogue", hint))?;
    }
    if args.json {
        print_json(&newest.outcome(&entry, changed))?;
    } else {
        // The path is as `git diff` shows it, if the catalogue is in the workspace.
        let name = catalogue.path.strip_prefix(workspace.root()).unwrap_or(&catalogue.path);
        write(shown(&diff::unified(&name.to_string_lossy(), &catalogue.text, &text)).as_bytes())?;
    }
    message!("{}", newest.verdict(&entry, changed, args.dry_run));
    Ok(())
}

impl<'a> Trust<'a> {
    /// Decides why the list of digests can be trusted, and finds the tools to verify it. Nothing has been fetched yet.
    fn in_entry(entry: &'a BumpEntry, args: &BumpArgs) -> Result<Self> {
        let name = &entry.name;
        let Some(signature) = &entry.signature else {
            return Self::unsigned(entry, args.unsigned);
        };
        if args.unsigned {
            let error = format!("--unsigned: leave it out, the publisher of {name} signs {}", entry.sums);
            bail!(Failure::usage(error));
        }
        let keyring = args.keyring.as_deref().or(entry.keyring.as_deref());
        let keyring = keyring.ok_or_else(|| {
            Failure::usage(format!("{name} names no keyring to verify {signature} with: pass --keyring FILE"))
        })?;
        Ok(Self::Signed(signature, Verifier::find(keyring)?))
    }

    fn unsigned(entry: &BumpEntry, agreed: bool) -> Result<Self> {
        let (name, sums) = (&entry.name, &entry.sums);
        if !agreed {
            bail!(Failure::usage(format!(
                "{name}: its publisher does not sign, so only the TLS connection protects {sums}; \
                 if that is sufficient, run again with --unsigned"
            )));
        }
        if entry.index.scheme() != "https" && !is_loopback(&entry.index) {
            bail!(Failure::usage(format!(
                "--unsigned: {} is not https, so {sums} could have been changed on the way",
                shown(entry.index.as_str())
            )));
        }
        message!("WARNING: {name}: THESE DIGESTS ARE NOT SIGNED; only the TLS connection protects them");
        Ok(Self::Connection)
    }
}

/// Returns whether the server is on this host. The answers of such a server cannot be changed on a network.
fn is_loopback(url: &Url) -> bool {
    let address = url.host_str().and_then(|host| host.parse::<std::net::Ipv4Addr>().ok());
    address.is_some_and(|address| address.is_loopback())
}

/// A search for the newest release of one publisher.
struct Bump<'a> {
    remote: &'a Http<'a>,
    entry: &'a BumpEntry,
    ui: &'a Ui,
}

impl Bump<'_> {
    fn newest(&self, trust: &Trust<'_>) -> Result<Newest> {
        let date = self.newest_date()?;
        self.refuse_to_go_back(&date)?;
        let sums_url = self.entry.url(&date, &self.entry.sums);
        let content = self.fetch(&sums_url, MAX_SUMS)?;
        let signer = match trust {
            Trust::Signed(name, verifier) => Some(self.signer(&date, name, &content, verifier)?),
            Trust::Connection => None,
        };
        let text = String::from_utf8(content).with_context(|| format!("read {}", shown(&sums_url)))?;
        let pins = self.entry.pins.iter().map(|(pin, from)| self.pin(pin, from, &date, &text));
        Ok(Newest { pins: pins.collect::<Result<_>>()?, date, signer })
    }

    fn fetch(&self, url: &str, limit: u64) -> Result<Vec<u8>> {
        self.ui.note(&format!("fetching {}", shown(url)));
        self.remote.get(url, limit)
    }

    fn newest_date(&self) -> Result<Date> {
        let index = &self.entry.index;
        let listing = self.fetch(index.as_str(), MAX_LISTING)?;
        index::newest(&String::from_utf8_lossy(&listing), index, &self.entry.release)
            .with_context(|| format!("find the newest release in {}", shown(index.as_str())))
    }

    /// Returns an error if the newest release is older than a pin. Publishers delete old releases and keep new ones,
    /// so a listing that has neither the pinned release nor a newer one is out of date.
    fn refuse_to_go_back(&self, date: &Date) -> Result<()> {
        let Some((pin, from)) = self.entry.pins.iter().find(|(_, from)| from > date) else {
            return Ok(());
        };
        bail_guest!(
            "{}: {date}, the newest release in {}, is older than {from}, which is pinned for {}; \
            nothing is changed", self.entry.name, shown(self.entry.index.as_str()), pin.arch;
            "a lagging mirror catches up later; to go back on purpose, edit the catalogue by hand"
        )
    }

    fn signer(&self, date: &Date, name: &str, content: &[u8], verifier: &Verifier) -> Result<Signer> {
        let url = self.entry.url(date, name);
        let signature = self.fetch(&url, MAX_SIGNATURE).with_context(|| {
            Failure::guest(
                format!("fetch the signature of {} {date}; the catalogue is left as it is", self.entry.name),
                "the catalogue says that this publisher signs, so the signature is required",
            )
        })?;
        verifier
            .verify(content, &signature, self.ui)
            .with_context(|| format!("verify {} by {}", self.entry.sums, shown(&url)))
    }

    /// Returns the new pin that replaces `old`: the file for the same architecture in the release of `to`.
    fn pin(&self, old: &Pin, from: &Date, to: &Date, sums: &str) -> Result<Pin> {
        let file = self.entry.file(old, to)?;
        let digest = sums::digest(&self.entry.sums, sums, &file)
            .with_context(|| format!("find the {} file of release {to}", old.arch))?;
        let url = self.entry.url(to, &file);
        let same = url == old.url && digest == old.digest;
        if from == to && !same {
            message!(
                "WARNING: release {to} is already pinned for {} with the digest {}, but its publisher now lists {digest}",
                old.arch,
                old.digest
            );
        }
        // Files with the same digest have the same length.
        let known = old.bytes.filter(|_| same);
        let bytes = self
            .remote
            .length(&url)
            .with_context(|| format!("check that the file {file} exists, which {} lists", self.entry.sums))?
            .or(known);
        Ok(Pin { arch: old.arch, url, digest, bytes })
    }
}

impl Newest {
    fn from(entry: &BumpEntry) -> String {
        let oldest = entry.pins.iter().map(|(_, from)| from).min();
        oldest.map_or_else(String::new, ToString::to_string)
    }

    /// Returns the JSON that `--json` prints.
    fn outcome(&self, entry: &BumpEntry, changed: bool) -> Value {
        let clean = |pin: &Pin| Pin { url: shown(&pin.url), ..pin.clone() };
        json!({
            "name": entry.name, "from": Self::from(entry), "to": self.date.to_string(), "changed": changed,
            "signed_by": self.signer, "entries": self.pins.iter().map(clean).collect::<Vec<_>>(),
        })
    }

    fn verdict(&self, entry: &BumpEntry, changed: bool, dry_run: bool) -> String {
        let (name, from, to) = (&entry.name, Self::from(entry), &self.date);
        let by = match &self.signer {
            Some(Signer { user, fingerprint }) => format!("signed by {user} ({fingerprint})"),
            None => "NOT SIGNED: protected by the TLS connection only".to_owned(),
        };
        match (changed, dry_run) {
            (false, _) => format!("{name}: up to date, release {to}, {by}"),
            (true, false) => format!("{name}: from release {from} to {to}, {by}"),
            (true, true) => format!("{name}: would go from release {from} to {to}, {by}; nothing is written"),
        }
    }
}
