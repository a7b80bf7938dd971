//! Closed lists: what can be written into a status or origin column.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! closed_list {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        pub enum $name { $($(#[$vdoc])* #[serde(rename = $text)] $variant,)+ }

        impl $name {
            /// Every member, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The text that stands in the column.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            /// The member written as `text`, if there is one.
            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)+ _ => None }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

closed_list! {
    /// How the download of one image ended: the `status` of `samples` and `annotated`.
    FetchStatus {
        /// The image is in the row.
        Ok = "ok",
        /// The address is not an absolute http or https URL.
        BadUrl = "bad_url",
        /// The site's robots.txt forbids the address, or could not be had because the server failed.
        Robots = "robots",
        /// The answer forbids use for model training (`X-Robots-Tag: noai, noimageai, noindex, noimageindex`, `tdm-reservation: 1`), or an
        /// opt-out list names the address.
        OptOut = "opt_out",
        /// The host's name could not be resolved.
        Dns = "dns",
        /// The address, or one that it redirects to, is not on the public internet (private, loopback, link-local, ...).
        ForbiddenAddress = "forbidden_address",
        /// No connection, or it broke before an answer.
        Connect = "connect",
        /// TLS failed.
        Tls = "tls",
        /// The total deadline passed.
        Timeout = "timeout",
        /// More redirects than allowed, or a redirect loop.
        Redirect = "redirect",
        /// An answer of 4xx other than 429.
        HttpClient = "http_4xx",
        /// An answer of 429 after all retries.
        RateLimited = "http_429",
        /// An answer of 5xx after all retries.
        HttpServer = "http_5xx",
        /// The body is larger than the cap.
        TooLarge = "too_large",
        /// The body ended early or the connection broke in it.
        Truncated = "truncated",
        /// The body is empty.
        Empty = "empty",
        /// The body has another digest than the one that was expected.
        HashMismatch = "hash_mismatch",
        /// The body is not an image of a known format.
        NotImage = "not_image",
        /// The image has more pixels than the guard allows.
        TooManyPixels = "too_many_pixels",
        /// The decoder refused the image.
        Decode = "decode",
        /// The image is smaller than the least side asked for.
        TooSmall = "too_small",
        /// The image is more elongated than allowed.
        Aspect = "aspect",
        /// The image was taken down: it is not fetched, or its bytes have been removed since.
        TakenDown = "taken_down",
    }
}

impl FetchStatus {
    /// Whether the same request may well succeed at another time: what `capfilt retry` fetches again if it is not told otherwise.
    #[must_use]
    pub const fn is_transient(self) -> bool {
        matches!(
            self,
            Self::Timeout | Self::Dns | Self::Connect | Self::Tls | Self::Truncated | Self::RateLimited | Self::HttpServer
        )
    }

    /// Whether fetching again can change anything at all.
    #[must_use]
    pub const fn can_be_retried(self) -> bool {
        !matches!(self, Self::Ok | Self::TakenDown)
    }
}

closed_list! {
    /// How a row of `captions` or `scores` ended.
    RowStatus {
        /// Worked out.
        Ok = "ok",
        /// Nothing to do: the sample has no image.
        NoImage = "no_image",
        /// The stored image could not be decoded.
        Decode = "decode",
    }
}

closed_list! {
    /// Where the text of a dataset row came from.
    Origin {
        /// The text found beside the image on the web.
        Web = "web",
        /// The captioner wrote it.
        Synthetic = "synthetic",
        /// A person wrote it as a caption.
        Human = "human",
    }
}

closed_list! {
    /// Where on the web a candidate's text stood. The order is the order of preference where one image has several texts.
    TextSource {
        /// The `alt` attribute.
        Alt = "alt",
        /// A `figcaption` around the image.
        Figcaption = "figcaption",
        /// The description of an image that a search API gives.
        Description = "description",
        /// The `title` attribute, or the title that a search API gives.
        Title = "title",
        /// The text column of a URL list.
        List = "list",
        /// The tags of an image that a search API gives, joined by commas.
        Tags = "tags",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_reads_back() {
        for s in FetchStatus::ALL {
            assert_eq!(FetchStatus::parse(s.as_str()), Some(*s));
            assert_eq!(serde_json::to_string(s).ok(), Some(format!("\"{s}\"")));
        }
        assert_eq!(FetchStatus::parse("fine"), None);
        assert!(TextSource::Alt < TextSource::Title);
    }
}
