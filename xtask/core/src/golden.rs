//! Golden files of the tests, in `test_data/`.

use std::path::Path;

/// Compares `actual` with `test_data/<name>`; `IOT_XTASK_BLESS=1` writes the file instead.
pub(crate) fn compare(name: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("test_data").join(name);
    if std::env::var_os("IOT_XTASK_BLESS").is_some() {
        std::fs::write(&path, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("read {}: {error}; IOT_XTASK_BLESS=1 writes it", path.display()));
    assert_eq!(actual, expected, "{} differs; IOT_XTASK_BLESS=1 writes it anew", path.display());
}
