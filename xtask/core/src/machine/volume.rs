//! Writes the XML of a volume in a storage pool (libvirt.org/formatstorage.html).

use quick_xml::Writer;
use quick_xml::events::BytesText;

use crate::format::name_of;
use crate::image::Format;

/// A volume to make.
#[derive(Debug, Clone, Copy)]
pub struct NewVolume<'a> {
    pub pool: &'a str,
    pub name: &'a str,
    pub format: Format,
    /// The size in bytes that a guest sees.
    pub capacity: u64,
    /// The path and the format of the backing file.
    pub backing: Option<(&'a str, Format)>,
    /// The permissions, in octal.
    pub mode: &'static str,
}

impl NewVolume<'_> {
    /// Returns the volume's XML. The volume is sparse.
    pub fn xml(&self) -> String {
        let mut xml = Writer::new(Vec::new());
        let text = |xml: &mut Writer<Vec<u8>>, name: &str, text: &str| {
            xml.create_element(name).write_text_content(BytesText::new(text)).map(drop)
        };
        let format = |xml: &mut Writer<Vec<u8>>, format: &Format| {
            let name = name_of(format);
            xml.create_element("format").with_attribute(("type", name.as_str())).write_empty().map(drop)
        };
        let written = xml.create_element("volume").write_inner_content(|xml| {
            text(xml, "name", self.name)?;
            text(xml, "capacity", &self.capacity.to_string())?;
            text(xml, "allocation", "0")?;
            xml.create_element("target").write_inner_content(|xml| {
                format(xml, &self.format)?;
                let mode = xml.create_element("permissions");
                mode.write_inner_content(|xml| text(xml, "mode", self.mode)).map(drop)
            })?;
            let Some((path, of)) = &self.backing else { return Ok(()) };
            let backing = xml.create_element("backingStore");
            backing
                .write_inner_content(|xml| {
                    text(xml, "path", path)?;
                    format(xml, of)
                })
                .map(drop)
        });
        written.expect("writing to memory does not fail");
        String::from_utf8(xml.into_inner()).expect("quick-xml writes UTF-8")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_described_with_its_backing_file() {
        let new = NewVolume {
            pool: "default",
            name: "iot-xtask-<1>.qcow2",
            format: Format::Qcow2,
            capacity: 6 << 30,
            backing: Some(("/pool/a & b", Format::Raw)),
            mode: "0600",
        };
        assert_eq!(
            new.xml(),
            "<volume><name>iot-xtask-&lt;1&gt;.qcow2</name><capacity>6442450944</capacity><allocation>0</allocation>\
             <target><format type=\"qcow2\"/><permissions><mode>0600</mode></permissions></target>\
             <backingStore><path>/pool/a &amp; b</path><format type=\"raw\"/></backingStore></volume>"
        );
    }
}
