//! Reads an XML document into a tree of elements. libvirt describes its capabilities, domains and volumes in such
//! documents.

use std::fmt;

use quick_xml::escape::unescape;
use quick_xml::events::{BytesStart, Event};
use quick_xml::{Reader, XmlVersion};

/// An element with its content. Names contain the namespace prefix as the document writes it (`qemu:arg`).
#[derive(Debug, Default)]
pub struct Element {
    name: String,
    attributes: Vec<(String, String)>,
    text: String,
    content: Vec<Element>,
}

impl Element {
    /// Returns the value of an attribute.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Returns the text that is directly in this element, without white space around it.
    pub fn text(&self) -> &str {
        self.text.trim()
    }

    /// Returns the elements at a path below this element, such as `guest/arch` or `metadata/app:run`.
    pub fn all(&self, path: &str) -> Vec<&Element> {
        path.split('/').fold(vec![self], |outer, name| {
            let content = outer.into_iter().flat_map(|element| &element.content);
            content.filter(|element| element.name == name).collect()
        })
    }

    /// Returns the first of the elements at a path below this element.
    pub fn first(&self, path: &str) -> Option<&Element> {
        self.all(path).into_iter().next()
    }

    /// Returns the texts of the elements at a path below this element.
    pub fn texts(&self, path: &str) -> Vec<String> {
        self.all(path).into_iter().map(|element| element.text().to_owned()).collect()
    }
}

/// Formats the start tag and the text, for a message. The special characters are not escaped.
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{}", self.name)?;
        self.attributes.iter().try_for_each(|(key, value)| write!(f, " {key}='{value}'"))?;
        write!(f, ">{}", self.text())
    }
}

/// Returns the outermost element of a document that libvirt wrote. The element's name must be `root`.
///
/// # Errors
/// Returns an error if the text is not such a document.
pub fn read_document(xml: &str, root: &str) -> Result<Element, String> {
    let mut reader = Reader::from_str(xml);
    reader.config_mut().expand_empty_elements = true;
    let mut document = Element::default();
    let read = fill(&mut document, &mut reader).and_then(|()| {
        let found = document.content.into_iter().find(|element| element.name == root);
        found.ok_or_else(|| "there is no such element".to_owned())
    });
    read.map_err(|error| format!("libvirt's {root} cannot be read: {error}"))
}

/// Reads the content of the element `outer` up to its end tag. For the document itself, the name of `outer` is empty.
fn fill(outer: &mut Element, reader: &mut Reader<&[u8]>) -> Result<(), String> {
    loop {
        match reader.read_event().map_err(|error| error.to_string())? {
            Event::Start(start) => {
                let mut inner = element(&start)?;
                fill(&mut inner, reader)?;
                outer.content.push(inner);
            }
            Event::Text(part) => outer.text.push_str(&part),
            Event::CData(part) => outer.text.push_str(&part),
            // quick-xml returns a reference, such as `&amp;`, as an event of its own.
            Event::GeneralRef(name) => {
                let reference = format!("&{};", &*name);
                outer.text.push_str(&unescape(&reference).map_err(|error| error.to_string())?);
            }
            Event::Eof if !outer.name.is_empty() => return Err(format!("it ends inside {}", outer.name)),
            Event::End(_) | Event::Eof => return Ok(()),
            _ => {}
        }
    }
}

/// Returns an empty element with the name and the attributes of a start tag.
fn element(start: &BytesStart<'_>) -> Result<Element, String> {
    let mut read = Element { name: start.name().as_ref().to_owned(), ..Element::default() };
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|error| format!("an attribute of {}: {error}", read.name))?;
        let key = attribute.key.as_ref().to_owned();
        let value = attribute.normalized_value(XmlVersion::Implicit1_0);
        let value = value.map_err(|error| format!("the attribute {key} of {}: {error}", read.name))?;
        read.attributes.push((key, value.into_owned()));
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_and_texts_are_unescaped() {
        let xml = "<disk a='/d &lt;1&gt; &amp; &quot;2&quot;'>\n /d &lt;1&#62; &amp;amp; <!-- no text --><![CDATA[&lt;]]>\n</disk>";
        let disk = read_document(xml, "disk").unwrap();
        assert_eq!(disk.attribute("a"), Some("/d <1> & \"2\""));
        assert_eq!(disk.text(), "/d <1> &amp; &lt;");
        assert_eq!(disk.to_string(), "<disk a='/d <1> & \"2\"'>/d <1> &amp; &lt;");
        assert_eq!((disk.attribute("b"), disk.first("source").is_none()), (None, true));
    }

    /// libvirt 9.0 returns the element in `metadata` in this form.
    #[test]
    fn elements_with_a_namespace_prefix_are_found_by_it() {
        let xml = "<domain type='qemu'>\n  <metadata>\n    <iot:run xmlns:iot=\"https://example.org/iot-xtask\">\n      \
                   <iot:id at='1'>a &amp; b</iot:id>\n      <iot:id>c</iot:id>\n    </iot:run>\n    \
                   <other:run xmlns:other=\"https://example.org/other\"/>\n  </metadata>\n</domain>";
        let domain = read_document(xml, "domain").unwrap();
        let run = domain.first("metadata/iot:run").unwrap();
        assert_eq!(run.attribute("xmlns:iot"), Some("https://example.org/iot-xtask"));
        assert_eq!((run.text(), run.texts("iot:id")), ("", vec!["a & b".to_owned(), "c".to_owned()]));
        assert_eq!(run.first("iot:id").unwrap().attribute("at"), Some("1"));
        assert_eq!((domain.all("metadata/run").len(), domain.all("metadata/other:run").len()), (0, 1));
    }

    #[test]
    fn a_document_that_cannot_be_read_is_an_error() {
        for (xml, reason) in [
            ("", "there is no such element"),
            ("<pool/>", "there is no such element"),
            ("<domain><name>vm</name>", "it ends inside domain"),
            ("<domain><name></domain></name>", "name"),
            ("<domain>&unknown;</domain>", "unknown"),
            ("<domain type='&unknown;'/>", "the attribute type of domain"),
            ("<domain type='qemu' type='kvm'/>", "an attribute of domain"),
        ] {
            let error = read_document(xml, "domain").unwrap_err();
            assert!(error.starts_with("libvirt's domain cannot be read: "), "{error}");
            assert!(error.contains(reason), "{xml}: {error}");
        }
    }
}
