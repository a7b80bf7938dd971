WARC/1.0
WARC-Type: metadata
WARC-Target-URI: http://a.test/p
Content-Type: application/json
Content-Length: 478

{"Container":{"Filename":"x"},"Envelope":{"WARC-Header-Metadata":{"WARC-Target-URI":"http://a.test/p"},"Payload-Metadata":{"HTTP-Response-Metadata":{"Headers":{"Content-Type":"text/html"},"HTML-Metadata":{"Head":{"Title":"T","Base":"http://b.test/","Metas":[{"name":"robots","content":"noai"}]},"Links":[{"path":"IMG@/src","url":"a.jpg","alt":"a \u00e9 cat"},{"path":"A@/href","url":"/x","text":"y"},{"path":"IMG@/data-src","url":"//c.test/d.png","title":"\ud83d\ude00 x"}]}}}}}

