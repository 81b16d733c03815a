//! Writes pins into a catalogue's text. Comments, order and spaces are kept. All other entries stay the same, byte for
//! byte.

use anyhow::{Context, Result, bail, ensure};
use toml_edit::{DocumentMut, Item, TableLike, Value};
use xtask_core::arch::VmArchitecture;

use super::pin::Pin;

/// Returns `text` with `pins` in the entry called `name`.
///
/// # Errors
/// Returns an error if the entry has no table for a pin, or if the file's line endings would change.
pub(super) fn pins(text: &str, name: &str, pins: &[Pin]) -> Result<String> {
    let mut document: DocumentMut = text.parse()?;
    ensure!(document.to_string() == text, "the file's line endings would change: write them as \\n");
    for pin in pins {
        let table = file_table(&mut document, name, pin.arch)?;
        set(table, "url", pin.url.as_str().into());
        set(table, "digest", pin.digest.to_string().into());
        match pin.bytes {
            Some(bytes) => {
                let bytes = i64::try_from(bytes).with_context(|| format!("write {bytes} bytes in TOML"))?;
                set(table, "bytes", bytes.into());
            }
            None => _ = table.remove("bytes"),
        }
    }
    Ok(document.to_string())
}

/// Returns the table `download.<arch>` of the entry called `name`, in any of TOML's notations.
fn file_table<'a>(
    document: &'a mut DocumentMut,
    name: &str,
    arch: VmArchitecture,
) -> Result<&'a mut dyn TableLike> {
    let named = |table: &dyn TableLike| table.get("name").and_then(Item::as_str) == Some(name);
    let image: &mut dyn TableLike = match document.get_mut("image") {
        Some(Item::ArrayOfTables(images)) => {
            images.iter_mut().find(|table| named(*table)).context("find the entry")?
        }
        Some(Item::Value(Value::Array(images))) => images
            .iter_mut()
            .filter_map(Value::as_inline_table_mut)
            .find(|table| named(*table))
            .context("find the entry")?,
        _ => bail!("find the array `image`"),
    };
    let download = image.get_mut("download").and_then(Item::as_table_like_mut);
    let file = download.and_then(|download| download.get_mut(arch.profile().machine));
    file.and_then(Item::as_table_like_mut).with_context(|| format!("find the table download.{arch}"))
}

/// Sets a value, and keeps the spaces and the comment of the old one. An equal value is left alone.
fn set(table: &mut dyn TableLike, key: &str, mut value: Value) {
    let Some(old) = table.get_mut(key).and_then(Item::as_value_mut) else {
        table.insert(key, Item::Value(value));
        return;
    };
    // A new value is always a text or a number, so these two comparisons are enough.
    if (old.as_str(), old.as_integer()) != (value.as_str(), value.as_integer()) {
        *value.decor_mut() = old.decor().clone();
        *old = value;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use xtask_core::digest::Algorithm;

    /// The digest in TEXT that the tests replace: 64 zeros.
    const OLD: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

    pub(crate) const TEXT: &str = r#"# The catalogue.
schema = 1
default = "noble"
fallback = "built"

[[image]]
name = "built"   # from packages
login_user = "somebody"
os_release = { id = "os", version_id = "1" }
glibc = "2.39"
page_size = 4096
packages = { suite = "s", layout = "grub", disk_mib = 1, include = [] }

[[image]]
name = "noble"
login_user = "somebody"
os_release = { id = "os", version_id = "1" }
glibc = "2.39"
page_size = 4096
[image.download]
format = "qcow2"
index = "https://publisher.example/noble"
release = "release-{date}"
sums = "SHA256SUMS"
signature = "SHA256SUMS.gpg"
keyring = "keys.gpg"
[image.download.x86_64]
url    = 'https://publisher.example/noble/release-20260705/noble-20260705-amd64.img' # the server's
digest = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
bytes  = 1_000 # about
# The end.

[[image]]
name = "inline"
login_user = "somebody"
os_release = { id = "os", version_id = "1" }
glibc = "2.39"
page_size = 4096
download = { format = "raw", index = "https://p.example/", release = "{date}", sums = "S", aarch64 = { url = "https://p.example/20260101/a", digest = "sha256:0000000000000000000000000000000000000000000000000000000000000000" } }

[[image]]
name = "nothing"
login_user = "somebody"
os_release = { id = "os", version_id = "1" }
glibc = "2.39"
page_size = 4096
download = { format = "raw", index = "https://p.example/", release = "{date}", sums = "S" }
"#;

    fn pin(arch: VmArchitecture, bytes: Option<u64>) -> Pin {
        Pin { arch, url: "https://new.example/".to_owned(), digest: Algorithm::Sha256.of(b"new"), bytes }
    }

    #[test]
    fn a_rewrite_changes_the_pins_alone() {
        let url = "'https://publisher.example/noble/release-20260705/noble-20260705-amd64.img'";
        let expected = TEXT
            .replacen(url, "\"https://new.example/\"", 1)
            .replacen(OLD, &Algorithm::Sha256.of(b"new").to_string(), 1)
            .replacen("1_000", "77", 1);
        let rewritten = pins(TEXT, "noble", &[pin(VmArchitecture::X86_64, Some(77))]).unwrap();
        assert_eq!(rewritten, expected);

        let expected = expected.replacen("bytes  = 77 # about\n", "", 1);
        let rewritten = pins(TEXT, "noble", &[pin(VmArchitecture::X86_64, None)]).unwrap();
        assert_eq!(rewritten, expected);

        let inline = pins(TEXT, "inline", &[pin(VmArchitecture::Aarch64, Some(5))]).unwrap();
        let digest = Algorithm::Sha256.of(b"new");
        let end =
            format!(r#"aarch64 = {{ url = "https://new.example/", digest = "{digest}" , bytes = 5 }} }}"#);
        assert!(inline.lines().any(|line| line.ends_with(&end)), "{inline}");
        assert_eq!(inline.lines().count(), TEXT.lines().count());
    }

    #[test]
    fn what_is_the_same_is_left_as_it_is_written() {
        let same = Pin {
            url: "https://publisher.example/noble/release-20260705/noble-20260705-amd64.img".to_owned(),
            digest: OLD.parse().unwrap(),
            ..pin(VmArchitecture::X86_64, Some(1000))
        };
        assert_eq!(pins(TEXT, "noble", std::slice::from_ref(&same)).unwrap(), TEXT);
        let dos = TEXT.replace('\n', "\r\n");
        assert!(pins(&dos, "noble", &[same]).unwrap_err().to_string().contains("line endings"));
    }
}
