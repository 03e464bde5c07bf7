import Foundation
import Testing

/// `docs/cve-classes.md` names tests; each must exist under its name.
@Suite struct CatalogueTests {
  @Test func everyTestThatTheCatalogueNamesExists() throws {
    let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
    let text = try String(contentsOf: root.appendingPathComponent("docs/cve-classes.md"), encoding: .utf8)
    let rows = text.split(separator: "\n").filter { $0.hasPrefix("| ") }.dropFirst()
    #expect(rows.count > 25)
    var named: Set<String> = []
    for row in rows {
      let cells = row.split(separator: "|")
      try #require(cells.count == 3, "\(row)")
      let tests = cells[2].matches(of: #/`([A-Za-z]+)`/#).map { String($0.1) }
      #expect(!tests.isEmpty || cells[2].contains("not built yet"), "\(row)")
      named.formUnion(tests)
    }
    var sources = ""
    let directory = root.appendingPathComponent("Tests")
    let files = try #require(FileManager.default.enumerator(at: directory, includingPropertiesForKeys: nil))
    for case let file as URL in files where file.pathExtension == "swift" {
      sources += try String(contentsOf: file, encoding: .utf8)
    }
    for name in named { #expect(sources.contains("func \(name)("), "\(name) is no test") }
  }
}
