// Sends a file N times by Node's own client, undici; prints the status of each answer.
import { readFile } from "node:fs/promises";

const [url, file, n] = process.argv.slice(2);
const body = await readFile(file);
for (let sent = 0; sent < Number(n); sent++) {
  try {
    const response = await fetch(url, { method: "POST", body });
    await response.arrayBuffer();
    console.log(response.status);
  } catch (error) {
    console.log(`lost: ${error.cause ?? error}`);
  }
}
