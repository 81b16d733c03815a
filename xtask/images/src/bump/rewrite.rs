//! Pins put into a catalogue's text: comments, order and spaces stay, and every other entry byte for byte.

use anyhow::{Context, Result, bail, ensure};
use toml_edit::{DocumentMut, Item, TableLike, Value};
use xtask_core::arch::VmArchitecture;

use super::catalogue::Pin;

/// `text` with `pins` in the entry called `name`.
///
/// # Errors
/// Where the entry has no table for a pin, or the file's line ends would not survive.
pub(super) fn pins(text: &str, name: &str, pins: &[Pin]) -> Result<String> {
    let mut document: DocumentMut = text.parse()?;
    ensure!(document.to_string() == text, "the file's line endings would change: write them as \\n");
    for pin in pins {
        let table = file_table(&mut document, name, pin.arch)?;
        set(table, "url", pin.url.as_str().into());
        set(table, "digest", pin.digest.as_str().into());
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

/// `download.<arch>` of the entry called `name`, however the tables are written.
fn file_table<'a>(
    document: &'a mut DocumentMut,
    name: &str,
    arch: VmArchitecture,
) -> Result<&'a mut dyn TableLike> {
    let named = |table: &dyn TableLike| table.get("name").and_then(Item::as_str) == Some(name);
    let image: &mut dyn TableLike = match document.get_mut("image") {
        Some(Item::ArrayOfTables(images)) => {
            images.iter_mut().find(|table| named(*table)).context("find it")?
        }
        Some(Item::Value(Value::Array(images))) => images
            .iter_mut()
            .filter_map(Value::as_inline_table_mut)
            .find(|table| named(*table))
            .context("find it")?,
        _ => bail!("find the array `image`"),
    };
    let download = image.get_mut("download").and_then(Item::as_table_like_mut);
    let file = download.and_then(|download| download.get_mut(arch.profile().machine));
    file.and_then(Item::as_table_like_mut).with_context(|| format!("find the table download.{arch}"))
}

/// A new value, with the old one's spaces and comment; left alone where it is the same.
fn set(table: &mut dyn TableLike, key: &str, mut value: Value) {
    let Some(old) = table.get_mut(key).and_then(Item::as_value_mut) else {
        table.insert(key, Item::Value(value));
        return;
    };
    let same = match (&*old, &value) {
        (Value::String(old), Value::String(new)) => old.value() == new.value(),
        (Value::Integer(old), Value::Integer(new)) => old.value() == new.value(),
        _ => false,
    };
    if !same {
        *value.decor_mut() = old.decor().clone();
        *old = value;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const TEXT: &str = r#"# The catalogue.
[[image]]
name = "built"   # from packages

[[image]]
name = "noble"
[image.download]
index = "https://publisher.example/noble"
release = "release-{date}"
sums = "SHA256SUMS"
signature = "SHA256SUMS.gpg"
keyring = "keys.gpg"
user = "somebody"
[image.download.x86_64]
url    = 'https://publisher.example/noble/release-20260705/noble-20260705-amd64.img' # the server's
digest = "sha256:00"
bytes  = 1_000 # about
# The end.

[[image]]
name = "inline"
download = { index = "https://p.example/", release = "{date}", sums = "S", aarch64 = { url = "https://p.example/20260101/a", digest = "" } }
"#;

    fn pin(arch: VmArchitecture, bytes: Option<u64>) -> Pin {
        Pin { arch, url: "https://new.example/".to_owned(), digest: "sha256:11".to_owned(), bytes }
    }

    #[test]
    fn a_rewrite_changes_the_pins_alone() {
        let url = "'https://publisher.example/noble/release-20260705/noble-20260705-amd64.img'";
        let expected = TEXT
            .replacen(url, "\"https://new.example/\"", 1)
            .replacen("sha256:00", "sha256:11", 1)
            .replacen("1_000", "77", 1);
        let rewritten = pins(TEXT, "noble", &[pin(VmArchitecture::X86_64, Some(77))]).unwrap();
        assert_eq!(rewritten, expected);

        let expected = expected.replacen("bytes  = 77 # about\n", "", 1);
        let rewritten = pins(TEXT, "noble", &[pin(VmArchitecture::X86_64, None)]).unwrap();
        assert_eq!(rewritten, expected);

        let inline = pins(TEXT, "inline", &[pin(VmArchitecture::Aarch64, Some(5))]).unwrap();
        let end = r#"aarch64 = { url = "https://new.example/", digest = "sha256:11" , bytes = 5 } }"#;
        assert!(inline.trim_end().ends_with(end), "{inline}");
        assert_eq!(inline.lines().count(), TEXT.lines().count());
    }

    #[test]
    fn what_is_the_same_is_left_as_it_is_written() {
        let same = Pin {
            url: "https://publisher.example/noble/release-20260705/noble-20260705-amd64.img".to_owned(),
            digest: "sha256:00".to_owned(),
            ..pin(VmArchitecture::X86_64, Some(1000))
        };
        assert_eq!(pins(TEXT, "noble", std::slice::from_ref(&same)).unwrap(), TEXT);
        let dos = TEXT.replace('\n', "\r\n");
        assert!(pins(&dos, "noble", &[same]).unwrap_err().to_string().contains("line endings"));
    }
}
