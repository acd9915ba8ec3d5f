// Comfort only: the page works without. Everything asks for the same page and takes over its answer half.
const upload = document.getElementById("upload"), chooser = document.getElementById("image")
const answer = document.getElementById("answer"), status = document.getElementById("status")
const drop = upload.querySelector(".drop"), limit = Number(upload.dataset.limit)
let underway = null
upload.querySelector("button").hidden = true
upload.querySelector("#limits span").hidden = false

function busy(text) {
  status.textContent = text
  answer.setAttribute("aria-busy", String(Boolean(text)))
}

function show(nodes, title) {
  answer.replaceChildren(...nodes)
  document.title = title
  const heading = answer.querySelector("h2")
  heading.focus({ preventScroll: true })
  const top = heading.getBoundingClientRect().top
  if (top < 0 || top > innerHeight * 0.7) answer.scrollIntoView()
}

function refuse(title, detail) {
  const card = document.createElement("div"), heading = document.createElement("h2"), text = document.createElement("p")
  card.className = "card problem"
  card.setAttribute("role", "alert")
  heading.tabIndex = -1
  heading.textContent = title
  text.textContent = detail
  card.append(heading, text)
  show([card], title)
}

async function send(files) {
  const size = files.reduce((sum, file) => sum + file.size, 0)
  if (size > limit) return refuse("Too large", `That is ${(size / 2 ** 20).toFixed(1)} MiB; at most ${limit / 2 ** 20} MiB are taken at once.`)
  underway?.abort()
  const mine = underway = new AbortController(), form = new FormData()
  for (const file of files) form.append("image", file, file.name || "picture")
  busy(files.length > 1 ? `Looking at ${files.length} pictures …` : "Looking at the picture …")
  try {
    const response = await fetch(upload.action, { method: "POST", body: form, headers: { Accept: "text/html" }, signal: mine.signal })
    const page = new DOMParser().parseFromString(await response.text(), "text/html")
    show([...page.getElementById("answer").childNodes], page.title)
  } catch (error) {
    if (mine.signal.aborted) return
    refuse("Not sent", "The service could not be reached, or it closed the connection. Check the network and try again.")
  }
  busy("")
}

chooser.addEventListener("change", () => {
  const files = [...chooser.files]
  chooser.value = ""
  if (files.length) send(files)
})

for (const name of ["dragenter", "dragover"]) document.addEventListener(name, event => {
  if (!event.dataTransfer.types.includes("Files")) return
  event.preventDefault()
  drop.classList.add("over")
})
for (const name of ["dragleave", "drop"]) document.addEventListener(name, event => {
  if (name === "drop" || !event.relatedTarget) drop.classList.remove("over")
})
document.addEventListener("drop", event => {
  if (!event.dataTransfer.files.length) return
  event.preventDefault()
  send([...event.dataTransfer.files])
})
document.addEventListener("paste", event => {
  if (event.clipboardData?.files.length) send([...event.clipboardData.files])
})

document.getElementById("fetch").addEventListener("submit", () => busy("Fetching the picture …"))
addEventListener("pageshow", () => busy(""))
