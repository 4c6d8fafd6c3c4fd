//! The common name out of a certificate's DER subject: the one thing webpki does not tell. Pure.
//! Reads <https://www.rfc-editor.org/rfc/rfc5280#section-4.1.2.4>, definite lengths only, and nothing else.

/// 2.5.4.3, commonName.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;

/// The last common name in `subject`, the content of a Name, as Go's crypto/x509 picks it. None if the DER is broken.
pub fn common_name(subject: &[u8]) -> Option<String> {
    let mut found = None;
    for (set, names) in elements(subject)? {
        let attributes = elements(names).filter(|list| set == SET && list.iter().all(|(tag, _)| *tag == SEQUENCE))?;
        for (_, attribute) in attributes {
            let [(OBJECT_IDENTIFIER, oid), (tag, value)] = *elements(attribute)?.as_slice() else { return None };
            if oid == COMMON_NAME {
                let known = tag == UTF8_STRING || ([PRINTABLE_STRING, IA5_STRING].contains(&tag) && value.is_ascii());
                found = Some(String::from_utf8(value.to_vec()).ok().filter(|_| known)?);
            }
        }
    }
    found
}

/// Tag and content of each element.
fn elements(mut bytes: &[u8]) -> Option<Vec<(u8, &[u8])>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (tag, length, rest) = match *bytes {
            [tag, length @ 0..=0x7f, ref rest @ ..] => (tag, usize::from(length), rest),
            [tag, 0x81, length, ref rest @ ..] => (tag, usize::from(length), rest),
            [tag, 0x82, high, low, ref rest @ ..] => (tag, usize::from(high) << 8 | usize::from(low), rest),
            _ => return None,
        };
        found.push((tag, rest.get(..length)?));
        bytes = rest.get(length..)?;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(oid: &[u8], tag: u8, value: &[u8]) -> Vec<u8> {
        let wrap = |tag: u8, value: &[u8]| [&[tag, u8::try_from(value.len()).unwrap()], value].concat();
        wrap(SET, &wrap(SEQUENCE, &[wrap(OBJECT_IDENTIFIER, oid), wrap(tag, value)].concat()))
    }

    #[test]
    fn the_last_common_name_counts() {
        let organization = attribute(&[0x55, 0x04, 0x0a], UTF8_STRING, b"org");
        let table = [
            (vec![], None),
            (organization.clone(), None),
            (attribute(COMMON_NAME, UTF8_STRING, "josé".as_bytes()), Some("josé")),
            (attribute(COMMON_NAME, PRINTABLE_STRING, b"front-proxy-client"), Some("front-proxy-client")),
            (attribute(COMMON_NAME, IA5_STRING, b"a@b"), Some("a@b")),
            (attribute(COMMON_NAME, 0x1e, b"\0a"), None),
            (attribute(COMMON_NAME, UTF8_STRING, b"\xff"), None),
            (attribute(COMMON_NAME, PRINTABLE_STRING, b"\xe9"), None),
            (
                [attribute(COMMON_NAME, UTF8_STRING, b"a"), organization, attribute(COMMON_NAME, UTF8_STRING, b"b")].concat(),
                Some("b"),
            ),
        ];
        for (subject, name) in table {
            assert_eq!(common_name(&subject).as_deref(), name, "{subject:x?}");
        }
    }

    #[test]
    fn every_cut_and_every_wrong_byte_is_survived() {
        let subject = attribute(COMMON_NAME, UTF8_STRING, b"front-proxy-client");
        for cut in 1..subject.len() {
            assert_eq!(common_name(&subject[..cut]), None, "{cut}");
        }
        for at in 0..subject.len() {
            for byte in 0..=255 {
                let mut broken = subject.clone();
                broken[at] = byte;
                let _ = common_name(&broken);
            }
        }
        for header in [&[SET, 0x80][..], &[SET, 0x83, 0, 0, 0], &[SET, 0x82, 0xff], &[SET, 0x84, 0xff, 0xff, 0xff, 0xff]] {
            assert_eq!(common_name(header), None);
        }
    }
}
