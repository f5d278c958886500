// Draws the documentation. A file of its own, because the content policy allows no script in the page.
"use strict";

// The path at which a proxy serves us, such as /api for /api/docs.
const prefix = new URL(".", window.location.href).pathname.replace(/\/$/, "");

// A proxy that strips its prefix leaves it out of the description too. "Try it out" would then miss the service.
function addServer(response) {
  if (prefix === "" || response.url !== new URL("openapi.json", window.location.href).href) {
    return response;
  }
  const description = JSON.parse(response.text);
  return { ...response, text: JSON.stringify({ servers: [{ url: prefix }], ...description }) };
}

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  showExtensions: true,
  showCommonExtensions: true,
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  responseInterceptor: addServer,
});
